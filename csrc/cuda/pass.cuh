// Code that both passes share: launches of the multi-kernel path, and access to the partial sums of a channel.
#pragma once

#include "launch.cuh"
#include "merge.cuh"
#include "plan.h"

namespace bn_ext::cuda {

// Launches the kernels of a pass in turn, until CUDA refuses one. If a later kernel failed to load for lack of memory,
// the first one would already have updated its outputs, so all kernels are loaded first unless they are known to be
// loaded.
class Pass {
 public:
  // Calls body(pass) to load the kernels, unless they are loaded already, and then to launch them.
  template <typename Body>
  static cudaError_t run(const Plan& plan, cudaStream_t stream, const Body& body) {
    Pass loading(plan, stream, false), launching(plan, stream, true);
    const cudaError_t error = LaunchedBefore::holds() ? cudaSuccess : body(loading);
    return error == cudaSuccess ? body(launching) : error;
  }

  // Launches kernel(plan, arguments...) with one block per slice and segment.
  template <typename... Parameters, typename... Arguments>
  void on_segments(void (*kernel)(Plan, Parameters...), size_t shared_bytes, const Arguments&... arguments) {
    next(kernel, plan_.blocks(), plan_.threads, shared_bytes, plan_, arguments...);
  }

  // Launches kernel(plan, lanes, arguments...) with `lanes` threads per channel, as ChannelSums expects.
  template <typename... Parameters, typename... Arguments>
  void on_channels(void (*kernel)(Plan, int, Parameters...), const Arguments&... arguments) {
    const int lanes = merge_lanes(plan_.segments);
    next(kernel, blocks_of_groups(plan_.channels, lanes), kMaxThreads, 0, plan_, lanes, arguments...);
  }

  cudaError_t error() const { return error_; }

 private:
  Pass(const Plan& plan, cudaStream_t stream, bool launches) : plan_(plan), stream_(stream), launches_(launches) {}

  template <typename Kernel, typename... Arguments>
  void next(Kernel* kernel, int64_t blocks, int threads, size_t shared_bytes, const Arguments&... arguments) {
    if (error_ != cudaSuccess) return;
    const Grid grid = {blocks, threads, shared_bytes, 1, false, plan_.uses_pdl};
    error_ = launches_ ? launch(kernel, grid, stream_, arguments...) : load(kernel);
  }

  const Plan& plan_;
  cudaStream_t stream_;
  bool launches_;
  cudaError_t error_ = cudaSuccess;
};

constexpr int kFinalisedAtATime = 6;  // partial sums per thread: nothing else hides memory latency

// The partial sums of the channel that a thread's group merges, one per segment. Groups without a channel, and threads
// for which is_first() is false, must not exit before all threads of the warp have merged.
template <typename Sums>
struct ChannelSums {
  Group group;
  int64_t channel;
  int64_t parts;  // 0 if there is no such channel
  const Sums* partials;

  __device__ ChannelSums(const Plan& plan, int lanes, const Sums* all)
      : group(lanes),
        channel((int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes),
        parts(channel < plan.channels ? plan.segments : 0),
        partials(all + channel * plan.segments) {}
  __device__ Sums operator()(int64_t segment) const { return load_sums(partials + segment); }
  __device__ bool is_first() const { return parts > 0 && group.lane == 0; }
};

}  // namespace bn_ext::cuda
