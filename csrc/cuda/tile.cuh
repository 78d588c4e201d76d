// A block's values of a slice in shared memory. Every thread puts its own rows there and reads no others', so there are
// no barriers for it.
#pragma once

#include <cuda_pipeline.h>

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// 16 bytes to shared memory while the thread goes on; the first to leave the cache where nothing reads them again.
template <bool kLast>
__device__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kLast) {
    constexpr uint64_t policy = 0x12F0000000000000;  // evict_first of all, as ptxas makes it
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "l"(policy)
                 : "memory");
    return;
  }
#endif
  __pipeline_memcpy_async(shared, global, 16);
}

// Rows of some tensors. A thread's rows go through it in chunks of plan.kept_rows, of which the first one is what is
// left over; the last one stays, until all have been there once and they come again from the end.
//
// Copies are committed in groups, so that rows are read while later ones are still on their way. An instruction that
// waits names, as a constant, how many groups may be left. It is kGroups - 1 for every group, because at first kGroups
// are committed at least, if need be without copies, and one more after each wait. If there are more, as with narrow
// accesses, what is beyond kGroups is awaited first.
template <typename T, int kVector, int kTensors>
class Tile {
 public:
  using V = Vector<T, kVector>;

  __device__ Tile(const Plan& plan, size_t begin, const void* const (&tensors)[kTensors])
      : own_(reinterpret_cast<V*>(shared_memory<unsigned char>() + begin) + threadIdx.x), plan_(plan) {
#pragma unroll
    for (int i = 0; i < kTensors; ++i) tensors_[i] = tensors[i];
  }

  // Of so many rows that are still to come.
  __device__ int first_chunk(int rows) const {
    return rows == 0 ? 0 : rows - (rows - 1) / plan_.kept_rows * plan_.kept_rows;
  }
  __device__ int last_chunk(int rows) const { return min(rows, plan_.kept_rows); }

  // The next rows of a walk are to be here, in memory's order; they are after wait(). is_last: they are not fetched
  // again.
  template <bool kBackwards, bool kOneChannel>
  __device__ void fetch(Walk<T, kBackwards, kOneChannel>& walk, int count, bool is_last) const {
    is_last ? fetch<kAllRows, true>(walk, count) : fetch<kAllRows, false>(walk, count);
  }
  static __device__ void wait() {
    __pipeline_commit();
    wait_until_left<0>();
  }

  // The same in groups of kGroupRows; the rows of a group are there after one wait_for_group() more.
  template <int kGroupRows, bool kOneChannel>
  __device__ void fetch_in_groups(Walk<T, false, kOneChannel>& walk, int count, bool is_last) const {
    is_last ? fetch<kGroupRows, true>(walk, count) : fetch<kGroupRows, false>(walk, count);
    for (int groups = count / kGroupRows; groups < kGroups; ++groups) __pipeline_commit();
  }
  static __device__ void wait_for_group() {
    wait_until_left<kGroups - 1>();
    __pipeline_commit();
  }

  __device__ const V& row(int tensor, int i) const { return *place(tensor, i); }

 private:
  static constexpr int kGroups = 8;
  static constexpr int kAllRows = 0;  // in one group, which is not committed

  __device__ int tensor_stride() const { return plan_.kept_rows * plan_.threads; }
  __device__ V* place(int tensor, int i) const { return own_ + tensor * tensor_stride() + i * plan_.threads; }
  template <int kGroupRows, bool kLast, bool kBackwards, bool kOneChannel>
  __device__ void fetch(Walk<T, kBackwards, kOneChannel>& walk, int count) const {
    V* to = place(0, kBackwards ? count - 1 : 0);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        copy<kLast>(to + tensor * tensor_stride(), walk.in(tensors_[tensor], walk.at));
      }
      walk.next(plan_);
      to += kBackwards ? -plan_.threads : plan_.threads;
      if constexpr (kGroupRows != kAllRows) {
        if (i % kGroupRows == kGroupRows - 1) __pipeline_commit();
      }
    }
  }
  template <int kLeft>
  static __device__ void wait_until_left() {
    __pipeline_wait_prior(kLeft);
    asm volatile("" ::: "memory");  // nothing is read before: CUDA's own wait does not say so to the compiler
  }
  template <bool kLast>
  static __device__ void copy(V* to, const T* from) {
    if constexpr (sizeof(V) == 16) {
      copy_async<kLast>(to, from);
    } else if constexpr (sizeof(V) >= 4) {
      __pipeline_memcpy_async(to, from, sizeof(V));
    } else {
      *to = load_last<kVector>(from);
    }
  }

  V* own_;
  const Plan& plan_;
  const void* tensors_[kTensors];
};

}  // namespace bn_ext::cuda
