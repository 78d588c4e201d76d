// Stagger and prefetch, which let some teams read while others write. Their defaults follow a model; lab/ measures
// passes with and without them.
#pragma once

#include "launch.cuh"
#include "plan.h"
#include "walk.cuh"

namespace bn_ext::cuda {

// Delays the second half of the initially resident teams, while memory serves the first half. All threads of a block
// call this at the beginning.
inline __device__ void stagger(const Plan& plan, int64_t team) {
  if (plan.stagger_ns == 0 || team < plan.staggered_teams || team >= 2 * plan.staggered_teams) return;
#ifdef __CUDACC__  // the simulated device has no time
  __nanosleep(static_cast<unsigned>(plan.stagger_ns));
#endif
}

// Prefetches rows of the team's next slice, if there is one, to the L2 cache. A block calls this before it waits.
template <typename T, bool kOneChannel>
__device__ void prefetch_next_slice(const Plan& plan, Block block, const void* tensor) {
  block.slice += plan.teams;
  if (plan.prefetched_rows == 0 || block.slice >= plan.slices) return;
  const Walk<T, false, kOneChannel> ahead(plan, block, tensor);
  prefetch_rows(plan, ahead, tensor, min(ahead.rows, plan.prefetched_rows));
}

}  // namespace bn_ext::cuda
