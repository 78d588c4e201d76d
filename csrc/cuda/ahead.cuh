// What teams do so that some of them read while others write. Both rest on a model; lab/ compares them with doing
// without.
#pragma once

#include "launch.cuh"
#include "plan.h"
#include "walk.cuh"

namespace bn_ext::cuda {

// At the beginning, by all threads of a block: the second half of the teams that are resident at first begin later. The
// memory is busy with the others meanwhile.
inline __device__ void stagger(const Plan& plan, int64_t team) {
  if (plan.stagger_ns == 0 || team < plan.staggered_teams || team >= 2 * plan.staggered_teams) return;
#ifdef __CUDACC__  // the simulated device has no time
  __nanosleep(static_cast<unsigned>(plan.stagger_ns));
#endif
}

// Before a block waits for its team: asks for rows of the team's next slice, if there is one, to come to the L2 cache.
template <typename T, bool kOneChannel>
__device__ void prefetch_next_slice(const Plan& plan, Block block, const void* tensor) {
  block.slice += plan.teams;
  if (plan.prefetched_rows == 0 || block.slice >= plan.slices) return;
  const Walk<T, false, kOneChannel> ahead(plan, block, tensor);
  prefetch_rows(plan, ahead, tensor, min(ahead.rows, plan.prefetched_rows));
}

}  // namespace bn_ext::cuda
