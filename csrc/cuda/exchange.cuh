// How the blocks of a team wait for each other, and exchange the sums and coefficients of their slice's channels.
#pragma once

#include <cooperative_groups.h>

#include "merge.cuh"
#include "plan.h"

namespace bn_ext::cuda {

// Clusters are of code compiled for sm_90 or newer; a plan has them only where such code is loaded, whatever the
// device.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline __device__ void arrive_in_cluster() { __cluster_barrier_arrive(); }
inline __device__ void wait_for_cluster() { __cluster_barrier_wait(); }
template <typename T>
__device__ T of_peer(const T* own, int block) {
  return *static_cast<const T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(block)));
}
#else
inline __device__ void arrive_in_cluster() { __trap(); }
inline __device__ void wait_for_cluster() { __trap(); }
template <typename T>
__device__ T of_peer(const T* own, int) {
  return *own;
}
#endif

// Raises a counter by one. Who sees that sees all that the block wrote before its last barrier.
inline __device__ void add_one_and_release(unsigned* counter) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#else
  atomicAdd(counter, 1);
#endif
}
inline __device__ unsigned load_and_acquire(const unsigned* counter) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#else
  return __ldcg(counter);
#endif
}

// A team, as one of its blocks sees it. The sums of a channel go from all blocks to one of them, those of the next
// channel to the next block; coefficients from there to all. All wait for each other before either is read; so nothing
// is written for the next slice while it is still read.
template <typename Sums, typename Coefficients>
class Exchange {
 public:
  // All threads of the grid must call this. The memory of a grid's teams is TeamWorkspace's.
  __device__ Exchange(const Plan& plan, const ResidentMemory& memory, void* workspace)
      : plan_(plan),
        sums_(shared_memory_at<Sums>(memory.sums)),
        coefficients_(shared_memory_at<Coefficients>(memory.coefficients)) {
    const unsigned segments = static_cast<unsigned>(plan.segments);
    first_slice_ = blockIdx.x / segments;
    segment_ = static_cast<int>(blockIdx.x % segments);
    memory_of_team_ = static_cast<unsigned char*>(workspace) + first_slice_ * TeamWorkspace(plan).bytes;
  }

  __device__ Block first_block() const { return {first_slice_, segment_}; }

  // For each slice, before anything else is called; all threads of the grid must call this. It waits for them, once.
  __device__ void start() {
    if (plan_.team != Team::kGrid || started_) return;
    started_ = true;
    if (segment_ == 0 && threadIdx.x == 0) __stcg(counter(), 0u);
    cooperative_groups::this_grid().sync();
  }

  // By one thread of the block.
  __device__ void leave_sums(int place, const Sums& sums) const {
    if (plan_.team == Team::kGrid) {
      store_for_peers(sums_in_workspace(place) + segment_, sums);
    } else {
      sums_[place] = sums;
    }
  }

  // When all blocks have left theirs: calls finish(channel, own, get) for this block's share of channels, where get(i)
  // are the sums of the i-th block. For the first thread of a channel, own is load(the channel's index), which does not
  // wait for other blocks if this is the thread's first channel. All threads of the block must call this, and those of
  // a warp are in finish together.
  template <typename Load, typename Finish>
  __device__ void for_own_channels(int64_t slice, const Load& load, const Finish& finish) {
    const int blocks = static_cast<int>(plan_.segments);
    const int thread = static_cast<int>(threadIdx.x);
    const int first = segment_ + thread / plan_.team_lanes * blocks;
    const int64_t first_index = slice * plan_.slice_channels + first;
    decltype(load(first_index)) own = {};
    if (thread % plan_.team_lanes == 0 && first < plan_.channels_of(slice)) own = load(first_index);
    wait();
    for_channels(plan_, slice, plan_.team_lanes, segment_, blocks, [&](const Channel& channel) {
      if (channel.is_first() && channel.place != first) own = load(channel.index);
      finish(channel, own, [&](int64_t block) {
        if (plan_.team == Team::kGrid) return load_of_peer(sums_in_workspace(channel.place) + block);
        return plan_.team == Team::kBlock ? sums_[channel.place]
                                          : of_peer(sums_ + channel.place, static_cast<int>(block));
      });
    });
  }

  // By one thread of for_own_channels's group: what the channel's sums are in all, for for_own_totals, in the place of
  // the block's own, which no other block and no other group reads. All of the group have read them: __syncwarp()
  // before.
  __device__ void keep_total(int place, const Sums& total) const { sums_[place] = total; }

  // After gather_coefficients: calls body(channel's index, total, coefficients) for this block's share of channels, by
  // one thread each: what nobody waits for is done here.
  template <typename Body>
  __device__ void for_own_totals(int64_t slice, const Body& body) const {
    const int blocks = static_cast<int>(plan_.segments), threads = plan_.threads * blocks;
    for (int place = segment_ + static_cast<int>(threadIdx.x) * blocks; place < plan_.channels_of(slice);
         place += threads) {
      body(slice * plan_.slice_channels + place, sums_[place], coefficients_[place]);
    }
  }

  // By one thread of the block whose share the channel is.
  __device__ void leave_coefficients(int place, const Coefficients& coefficients) const {
    if (plan_.team == Team::kGrid) {
      store_for_peers(coefficients_in_workspace() + place, coefficients);
    } else {
      coefficients_[place] = coefficients;
    }
  }

  // When all blocks have left theirs: those of all channels of the slice. All threads of the block must call this.
  __device__ const Coefficients* gather_coefficients(int64_t slice) {
    wait();
    if (plan_.team == Team::kBlock) return coefficients_;
    const int blocks = static_cast<int>(plan_.segments);
    const int channels = plan_.channels_of(slice);
    for (int place = static_cast<int>(threadIdx.x); place < channels; place += plan_.threads) {
      if (plan_.team == Team::kGrid) {
        coefficients_[place] = load_of_peer(coefficients_in_workspace() + place);
      } else if (place % blocks != segment_) {
        coefficients_[place] = of_peer(coefficients_ + place, place % blocks);
      }
    }
    if (plan_.team == Team::kCluster) arrive_in_cluster();
    __syncthreads();
    return coefficients_;
  }

  // At the very end: a block's shared memory stays until its peers have read it.
  __device__ void finish() const {
    if (plan_.team == Team::kCluster) wait_for_cluster();
  }

 private:
  __device__ unsigned* counter() const { return reinterpret_cast<unsigned*>(memory_of_team_); }
  __device__ Sums* sums_in_workspace(int place) const {
    return reinterpret_cast<Sums*>(memory_of_team_ + TeamWorkspace(plan_).sums) + place * plan_.segments;
  }
  __device__ Coefficients* coefficients_in_workspace() const {
    return reinterpret_cast<Coefficients*>(memory_of_team_ + TeamWorkspace(plan_).coefficients);
  }

  // For all threads of the team; what they wrote before is then seen by all.
  __device__ void wait() {
    if (plan_.team == Team::kCluster) {
      arrive_in_cluster();
      return wait_for_cluster();
    }
    __syncthreads();
    if (plan_.team != Team::kGrid) return;
    arrivals_ += static_cast<unsigned>(plan_.segments);
    if (threadIdx.x == 0) {
      add_one_and_release(counter());
      while (load_and_acquire(counter()) < arrivals_) __nanosleep(20);
    }
    __syncthreads();
  }

  const Plan& plan_;
  Sums* sums_;
  Coefficients* coefficients_;
  unsigned char* memory_of_team_;
  int64_t first_slice_;
  int segment_;
  bool started_ = false;
  unsigned arrivals_ = 0;  // of blocks, that the team's counter is to reach
};

inline Grid grid_of_teams(const Plan& plan, int tensors, size_t value_bytes) {
  const int cluster_blocks = plan.team == Team::kCluster ? static_cast<int>(plan.segments) : 1;
  const size_t shared_bytes = ResidentMemory(plan, tensors, value_bytes).bytes;
  const bool cooperative = plan.team == Team::kGrid;
  return {plan.blocks(), plan.threads, shared_bytes, cluster_blocks, cooperative, plan.starts_early && !cooperative};
}

}  // namespace bn_ext::cuda
