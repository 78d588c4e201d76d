// What the forward and the backward pass have in common: their launches, and how a kernel finds the sums of a channel.
#pragma once

#include "launch.cuh"
#include "merge.cuh"
#include "plan.h"

namespace bn_ext::cuda {

// The kernels of a pass on a stream, one after another, until one is refused. What the first one changes would be lost
// if a later one could not be had, for want of memory for its code; so all are loaded before, if that is not known.
class Pass {
 public:
  // Calls body(pass) to load the kernels, unless they are loaded already, and then to launch them.
  template <typename Body>
  static cudaError_t run(const Plan& plan, cudaStream_t stream, const Body& body) {
    Pass loading(plan, stream, false), launching(plan, stream, true);
    const cudaError_t error = LaunchedBefore::holds() ? cudaSuccess : body(loading);
    return error == cudaSuccess ? body(launching) : error;
  }

  // kernel(plan, arguments...), a block per slice and segment.
  template <typename... Parameters, typename... Arguments>
  void on_segments(void (*kernel)(Plan, Parameters...), size_t shared_bytes, const Arguments&... arguments) {
    next(kernel, plan_.blocks(), plan_.threads, shared_bytes, plan_, arguments...);
  }

  // kernel(plan, lanes, arguments...), `lanes` threads per channel: see ChannelSums.
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

constexpr int kFinalisedAtATime = 6;  // partial sums of a thread: nothing else hides the memory's latency

// The partial sums of the channel that a thread's group merges, one for each segment. Groups without a channel, and
// threads that are not `first`, must stay until all have merged.
template <typename Sums>
struct ChannelSums {
  Group group;
  int64_t channel;
  int64_t parts;  // none where there is no such channel
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
