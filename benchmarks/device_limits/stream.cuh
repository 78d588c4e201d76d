// The plainest kernel that reads, writes, copies or adds: what the memory gives at most.
#pragma once

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/plan.h"
#include "random_data.cuh"

namespace device_limits {

constexpr int kThreads = bn_ext::cuda::kMaxThreads;  // of a block, as the package's kernels have them
constexpr int kVectorBytes = 16;

// What loads and stores tell the caches.
enum class Hint {
  kPlain,            // nothing
  kStreaming,        // what is read and written is the first to leave them
  kStreamingStores,  // only what is written
};

template <Hint kHint>
__device__ uint4 load_vector(const uint4* p) {
  return kHint == Hint::kStreaming ? __ldcs(p) : __ldg(p);
}
template <Hint kHint>
__device__ void store_vector(uint4* p, const uint4& v) {
  if constexpr (kHint == Hint::kPlain) {
    __stwb(p, v);
  } else {
    __stcs(p, v);
  }
}

// The sum over a warp's lanes, which all lanes get; all must call this.
inline __device__ unsigned sum_of_warp(unsigned sum) {
  for (int lane = bn_ext::cuda::kWarpThreads / 2; lane > 0; lane /= 2) {
    sum += __shfl_xor_sync(bn_ext::cuda::kAllLanes, sum, lane);
  }
  return sum;
}

// Where a warp of a grid leaves what it has read, so that it had to be read: sums is (blocks, warps of a block).
inline __device__ void leave_sum(unsigned* sums, unsigned sum) {
  sum = sum_of_warp(sum);
  if (threadIdx.x % bn_ext::cuda::kWarpThreads == 0) {
    __stcg(sums + global_thread() / bn_ext::cuda::kWarpThreads, sum);
  }
}

struct Stream {
  const uint4* inputs[2];  // (vectors,) each, as many as there are
  uint4* output;           // (vectors,), where it is written
  unsigned* sums;          // (blocks, warps), where it is not
  int64_t vectors;         // a multiple of kThreads * kRows
  bool backwards;          // chunks from the end to the beginning
};

// y = a, y = a + b, the sum of a's words, or y = random_vector, by the number of inputs and whether it writes.
// Grid: any number of blocks of kThreads, which take turns at chunks of kThreads * kRows vectors; of a chunk a thread
// reads kRows vectors before it uses the first. Moves 16 bytes per vector, input and output.
template <int kInputs, bool kWrites, Hint kHint, int kRows>
__global__ void __launch_bounds__(kThreads) stream_kernel(const Stream s) {
  bn_ext::cuda::pdl_wait();
  const int64_t chunks = s.vectors / (kThreads * kRows);
  unsigned sum = 0;
  for (int64_t turn = blockIdx.x; turn < chunks; turn += gridDim.x) {
    const int64_t first = (s.backwards ? chunks - 1 - turn : turn) * kThreads * kRows + threadIdx.x;
    uint4 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = first + i * kThreads;
      if constexpr (kInputs == 0) {
        rows[i] = random_vector(at);
      } else {
        rows[i] = load_vector<kHint>(s.inputs[0] + at);
      }
    }
    if constexpr (kInputs == 2) {
      uint4 more[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) more[i] = load_vector<kHint>(s.inputs[1] + first + i * kThreads);
#pragma unroll
      for (int i = 0; i < kRows; ++i) rows[i] = rows[i] + more[i];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kWrites) {
        store_vector<kHint>(s.output + first + i * kThreads, rows[i]);
      } else {
        sum += sum_of(rows[i]);
      }
    }
  }
  if constexpr (!kWrites) leave_sum(s.sums, sum);
}

}  // namespace device_limits
