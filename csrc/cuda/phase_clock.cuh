// Records when a block reaches a phase of a slice. Without BN_EXT_PHASE_CLOCK, it compiles to no instruction.
#pragma once

#include <cuda_runtime.h>

#include "phase_clock.h"

#ifdef BN_EXT_PHASE_CLOCK
#include <vector>
#endif

namespace bn_ext::cuda {

#ifdef BN_EXT_PHASE_CLOCK

// The times of all files of instantiations/; each file has its own.
inline std::vector<const PhaseTimes*>& all_phase_times() {
  static std::vector<const PhaseTimes*> all;
  return all;
}

namespace {

__device__ PhaseTimes phase_times;
[[maybe_unused]] const bool kRegistered = (all_phase_times().push_back(&phase_times), true);

inline __device__ uint64_t nanoseconds() {
#ifdef __CUDACC__
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
#else  // tests/cuda_on_cpu: one step per mark
  static uint64_t now = 0;
  return ++now;
#endif
}

// The clock of one thread. Only the first thread of a clocked block records times, and only for the block's first
// kClockedSlices slices.
class PhaseClock {
 public:
  __device__ PhaseClock() {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kClocks; ++i) {
      if (blockIdx.x == static_cast<unsigned>(clocked_block(i))) left_ = kClockedSlices, times_ = phase_times.at[i];
    }
  }

  // Only the first mark of a phase in a slice counts.
  __device__ void mark(Phase phase) {
    if (phase == Phase::kStart) {
      last_ = -1;
      slice_ = --left_ < 0 ? nullptr : times_++;
    }
    if (slice_ == nullptr || static_cast<int>(phase) <= last_) return;
    last_ = static_cast<int>(phase);
    (*slice_)[last_] = nanoseconds();
  }

 private:
  uint64_t (*times_)[kPhases] = nullptr;
  uint64_t (*slice_)[kPhases] = nullptr;
  int left_ = 0;
  int last_ = -1;
};

}  // namespace

#else

struct PhaseClock {
  __device__ void mark(Phase) const {}
};

#endif

}  // namespace bn_ext::cuda
