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
    is_last ? fetch<true>(walk, count) : fetch<false>(walk, count);
  }
  static __device__ void wait() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    asm volatile("" ::: "memory");  // nothing is read before: CUDA's own wait does not say so to the compiler
  }

  __device__ const V& row(int tensor, int i) const { return *place(tensor, i); }

 private:
  __device__ int tensor_stride() const { return plan_.kept_rows * plan_.threads; }
  __device__ V* place(int tensor, int i) const { return own_ + tensor * tensor_stride() + i * plan_.threads; }
  template <bool kLast, bool kBackwards, bool kOneChannel>
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
    }
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
