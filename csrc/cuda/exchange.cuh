// How the blocks of a team wait for each other, and exchange sums and coefficients of the channels of their slice.
#pragma once

#include "merge.cuh"
#include "phase_clock.cuh"
#include "plan.h"

namespace bn_ext::cuda {

// Clusters need code compiled for sm_90 or newer. A plan has clusters only if such code is loaded, whatever the device
// supports.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// All threads of the block must call this. It does not release their writes; release_to_cluster does.
inline __device__ void arrive_in_cluster() { __cluster_barrier_arrive_relaxed(); }
// One thread calls this before it arrives: releases the block's writes before its last barrier to the cluster. A fence
// in every thread would be one of the whole GPU.
inline __device__ void release_to_cluster() {
#ifdef __CUDACC__
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}
inline __device__ void wait_for_cluster() { __cluster_barrier_wait(); }
template <typename T>
__device__ T load_from_peer(const T* own, int block) {
  return *static_cast<const T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(block)));
}
#else
inline __device__ void arrive_in_cluster() { __trap(); }
inline __device__ void release_to_cluster() { __trap(); }
inline __device__ void wait_for_cluster() { __trap(); }
template <typename T>
__device__ T load_from_peer(const T* own, int) {
  return *own;
}
#endif

// Release-increments the counter: a thread that acquires the new value also sees all writes of the block before its
// last barrier.
inline __device__ void add_one_and_release(unsigned* counter) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#else
  atomicAdd(counter, 1);
#endif
}
// The same, and returns the old value. It also acquires, so the last block sees all that the others saw and wrote.
inline __device__ unsigned add_one_and_see(unsigned* counter) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return atomicAdd(counter, 1);
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

// One block's view of its team. If each block merges the sums of all blocks, they wait once per slice. Two buffers make
// this safe: a block stores sums of slice k + 2 over those of slice k only after all blocks have arrived with slice
// k + 1, and so have read slice k. Otherwise each block merges its share of the channels, every segments-th one, and
// all blocks read its coefficients; they wait before sums are read and before coefficients are read. docs/exchange.md
// argues that this is correct; tests/models/exchange.pml is a model of it.
template <typename Sums, typename Coefficients, typename Clock = PhaseClock>
class Exchange {
 public:
  // `workspace` has a TeamWorkspace per team of a grid.
  __device__ Exchange(const Plan& plan, const SinglePassMemory& memory, const Workspace& workspace)
      : plan_(plan),
        merges_all_(plan.every_block_merges()),
        sums_(shared_memory_at<Sums>(memory.sums)),
        coefficients_(shared_memory_at<Coefficients>(memory.coefficients)) {
    const unsigned segments = static_cast<unsigned>(plan.segments);
    first_slice_ = blockIdx.x / segments;
    segment_ = static_cast<int>(blockIdx.x % segments);
    memory_of_team_ = static_cast<unsigned char*>(workspace.memory) + first_slice_ * TeamWorkspace(plan).bytes;
    counters_ = workspace.counters + first_slice_;
  }

  __device__ Block first_block() const { return {first_slice_, segment_}; }

  // Publishes the block's sums of a channel for its team. One thread per channel calls this.
  __device__ void publish_sums(int slot, const Sums& sums) const {
    if (plan_.team == Team::kGrid) {
      store_through_l2(sums_in_workspace(slot) + segment_, sums);
    } else {
      sums_[slot] = sums;
    }
  }

  // Waits for the sums of all blocks, and calls finish(channel, own, get) for the channels that this block merges, all
  // or its share. get(i) returns the sums of the i-th block. In the first thread of a channel's group, `own` is
  // load(index of the channel); for a thread's first channel, it loads before the wait. All threads of the block must
  // call this, and those of a warp are in finish together.
  template <typename Load, typename Finish>
  __device__ void for_assigned_channels(int64_t slice, const Load& load, const Finish& finish) {
    const int begin = merges_all_ ? 0 : segment_, step = merges_all_ ? 1 : static_cast<int>(plan_.segments);
    const int thread = static_cast<int>(threadIdx.x);
    const int first = begin + thread / plan_.team_lanes * step;
    const int64_t first_index = slice * plan_.slice_channels + first;
    decltype(load(first_index)) own = {};
    if (thread % plan_.team_lanes == 0 && first < plan_.channels_of(slice)) own = load(first_index);
    wait();
    clock.mark(Phase::kFirstBarrier);
    for_channels(plan_, slice, plan_.team_lanes, begin, step, [&](const Channel& channel) {
      if (channel.is_first() && channel.slot != first) own = load(channel.index);
      finish(channel, own, [&](int64_t block) {
        if (plan_.team == Team::kGrid) return load_through_l2(sums_in_workspace(channel.slot) + block);
        return plan_.team == Team::kBlock ? sums_[channel.slot]
                                          : load_from_peer(sums_ + channel.slot, static_cast<int>(block));
      });
    });
  }

  // Keeps the total of a channel for for_assigned_totals. One thread of the channel's group calls this, after the whole
  // group has read the sums, which the total may overwrite: call __syncwarp() first.
  __device__ void keep_total(int slot, const Sums& total) const { totals()[slot] = total; }

  // After gather_coefficients: calls body(index of the channel, total, coefficients) by one thread for each channel of
  // this block's share. Work that no other block waits for belongs here.
  template <typename Body>
  __device__ void for_assigned_totals(int64_t slice, const Body& body) const {
    const int blocks = static_cast<int>(plan_.segments), threads = plan_.threads * blocks;
    for (int slot = segment_ + static_cast<int>(threadIdx.x) * blocks; slot < plan_.channels_of(slice);
         slot += threads) {
      body(slice * plan_.slice_channels + slot, totals()[slot], coefficients_[slot]);
    }
  }

  // Publishes a channel's coefficients. One thread of each block that merges the channel calls this.
  __device__ void publish_coefficients(int slot, const Coefficients& coefficients) const {
    if (plan_.team == Team::kGrid && !merges_all_) {
      store_through_l2(coefficients_in_workspace() + slot, coefficients);
    } else {
      coefficients_[slot] = coefficients;
    }
  }

  // Returns the coefficients of all channels of the slice, after a wait if peers merge some of them. All threads of the
  // block must call this.
  __device__ const Coefficients* gather_coefficients(int64_t slice) {
    if (!merges_all_) copy_coefficients(slice);
    __syncthreads();
    if (plan_.team == Team::kCluster) arrive_in_cluster();  // relaxed: only reads precede it
    is_odd_ = !is_odd_;
    return coefficients_;
  }

  // Keeps a block of a cluster from changing its shared memory, or from exiting, before its peers have read it.
  __device__ void wait_for_readers() const {
    if (plan_.team == Team::kCluster) wait_for_cluster();
  }

  // Ends the exchange. The last block of a team resets the counters, because no other block reads them any more.
  __device__ void finish() const {
    wait_for_readers();
    if (plan_.team != Team::kGrid || threadIdx.x != 0) return;
    if (add_one_and_see(&counters_->leavers) + 1 < plan_.segments) return;
    __stcg(&counters_->arrivals, 0u);
    __stcg(&counters_->leavers, 0u);
  }

  Clock clock;  // for the marks of the kernels

 private:
  // If the peers of a cluster read sums_, the totals replace the partial sums of this block's threads, which are
  // already merged.
  __device__ Sums* totals() const {
    return plan_.team == Team::kCluster && merges_all_ ? shared_memory<Sums>() : sums_;
  }
  __device__ Sums* sums_in_workspace(int slot) const {
    return reinterpret_cast<Sums*>(memory_of_team_ + (is_odd_ ? TeamWorkspace(plan_).sums : 0)) + slot * plan_.segments;
  }
  __device__ Coefficients* coefficients_in_workspace() const {
    return reinterpret_cast<Coefficients*>(memory_of_team_ + TeamWorkspace(plan_).coefficients);
  }

  // Copies coefficients from the blocks that have merged them, after a wait for these blocks.
  __device__ void copy_coefficients(int64_t slice) {
    wait();
    const int blocks = static_cast<int>(plan_.segments);
    const int channels = plan_.channels_of(slice);
    for (int slot = static_cast<int>(threadIdx.x); slot < channels; slot += plan_.threads) {
      if (plan_.team == Team::kGrid) {
        coefficients_[slot] = load_through_l2(coefficients_in_workspace() + slot);
      } else if (slot % blocks != segment_) {
        coefficients_[slot] = load_from_peer(coefficients_ + slot, slot % blocks);
      }
    }
  }

  // Waits for all threads of the team. All then see the writes before it.
  __device__ void wait() {
    __syncthreads();
    if (plan_.team == Team::kCluster) {
      if (threadIdx.x == 0) release_to_cluster();
      __syncwarp();
      arrive_in_cluster();
      return wait_for_cluster();
    }
    if (plan_.team != Team::kGrid) return;
    arrivals_ += static_cast<unsigned>(plan_.segments);
    if (threadIdx.x == 0) {
      add_one_and_release(&counters_->arrivals);
      while (load_and_acquire(&counters_->arrivals) < arrivals_) __nanosleep(20);
    }
    __syncthreads();
  }

  const Plan& plan_;
  bool merges_all_;
  Sums* sums_;
  Coefficients* coefficients_;
  unsigned char* memory_of_team_;
  TeamCounters* counters_;
  int64_t first_slice_;
  int segment_;
  bool is_odd_ = false;    // parity of the slice in this block's order
  unsigned arrivals_ = 0;  // of blocks, for which the next wait waits
};

inline Grid grid_of_teams(const Plan& plan, int tensors, size_t value_bytes) {
  const int cluster_blocks = plan.team == Team::kCluster ? static_cast<int>(plan.segments) : 1;
  const size_t shared_bytes = SinglePassMemory(plan, tensors, value_bytes).bytes;
  const bool cooperative = plan.team == Team::kGrid;
  return {plan.blocks(), plan.threads, shared_bytes, cluster_blocks, cooperative, plan.uses_pdl && !cooperative};
}

}  // namespace bn_ext::cuda
