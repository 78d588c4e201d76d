// Whether the kernels of the current launch are known to be loaded and to have their attributes.
#pragma once

namespace bn_ext::cuda {

// While an object with `holds` is alive, its thread launches a pass like one that it has launched on this device before
// (plan_cache.h). The kernels are loaded and have their attributes, so CUDA is called only for the launches.
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
