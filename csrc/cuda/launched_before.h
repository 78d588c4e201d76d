// Whether a thread knows of the kernels that it launches that CUDA has been asked for all that they need.
#pragma once

namespace bn_ext::cuda {

// While one of these is alive that holds, its thread launches a pass like one that it has launched on this device
// before (plan_cache.h): the kernels are loaded and have their attributes, so that only launches are asked of CUDA.
class LaunchedBefore {
 public:
  explicit LaunchedBefore(bool holds) { value() = holds; }
  ~LaunchedBefore() { value() = false; }
  LaunchedBefore(const LaunchedBefore&) = delete;
  LaunchedBefore& operator=(const LaunchedBefore&) = delete;

  static bool holds() { return value(); }

 private:
  static bool& value() {
    thread_local bool holds = false;
    return holds;
  }
};

}  // namespace bn_ext::cuda
