// Nothing but barriers, one after another.
#pragma once

#include <cooperative_groups.h>

#include "teams.cuh"

namespace device_limits {

enum class Barrier {
  kBlock,        // of a block's threads
  kCluster,      // of a cluster, both halves at once: every thread releases what it has written
  kOneFence,     // the same, where one thread releases it for its block: exchange.cuh's
  kCounter,      // of a team of a cooperative grid: exchange.cuh's, one counter per team
  kCooperative,  // CUDA's own, of the whole grid
};

constexpr int kCounterWords = 32;  // from one team's counter to the next one's: a cache line

struct Rounds {
  int rounds;          // 2 or more
  int team;            // blocks that wait for each other
  int sleep_ns;        // between two looks at a counter; 0: none
  unsigned* counters;  // (teams, kCounterWords), zero
  unsigned* progress;  // (blocks,), what the blocks have left for each other
  unsigned* wrong;     // raised for every block that has not found what its neighbour was to leave
};

inline __device__ void arrive_and_release_each() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

// As exchange.cuh waits.
inline __device__ void arrive_with_one_fence() {
  __syncthreads();
  if (threadIdx.x == 0) bn_ext::cuda::release_to_cluster();
  __syncwarp();
  bn_ext::cuda::arrive_in_cluster();
}

template <Barrier kBarrier>
__device__ void wait_for_team(const Rounds& r, unsigned& arrivals) {
  if constexpr (kBarrier == Barrier::kBlock) {
    __syncthreads();
  } else if constexpr (kBarrier == Barrier::kCluster) {
    arrive_and_release_each();
    bn_ext::cuda::wait_for_cluster();
  } else if constexpr (kBarrier == Barrier::kOneFence) {
    arrive_with_one_fence();
    bn_ext::cuda::wait_for_cluster();
  } else if constexpr (kBarrier == Barrier::kCooperative) {
    cooperative_groups::this_grid().sync();
  } else {
    unsigned* counter = r.counters + blockIdx.x / r.team * kCounterWords;
    arrivals += static_cast<unsigned>(r.team);
    __syncthreads();
    if (threadIdx.x == 0) {
      bn_ext::cuda::add_one_and_release(counter);
      while (bn_ext::cuda::load_and_acquire(counter) < arrivals) {
        if (r.sleep_ns > 0) __nanosleep(static_cast<unsigned>(r.sleep_ns));
      }
    }
    __syncthreads();
  }
}

// Rounds of a barrier. In the first and the last one each block leaves the round's number before the barrier, by its
// first thread, and looks for its neighbour's behind it, by its last. Grid: teams of r.team blocks. Moves next to
// nothing.
template <Barrier kBarrier>
__global__ void __launch_bounds__(512, 2) barrier_kernel(const Rounds r) {
  const unsigned team = static_cast<unsigned>(r.team);
  const unsigned neighbour = blockIdx.x / team * team + (blockIdx.x % team + 1) % team;
  unsigned arrivals = 0;
  for (int round = 0; round < r.rounds; ++round) {
    const bool is_checked = round == 0 || round + 1 == r.rounds;
    if (is_checked && threadIdx.x == 0) __stcg(r.progress + blockIdx.x, static_cast<unsigned>(round));
    wait_for_team<kBarrier>(r, arrivals);
    if (!is_checked) continue;
    if (threadIdx.x + 1 == blockDim.x && __ldcg(r.progress + neighbour) != static_cast<unsigned>(round)) {
      atomicAdd(r.wrong, 1u);
    }
    wait_for_team<kBarrier>(r, arrivals);  // before the next number is left
  }
}

}  // namespace device_limits
