// A block's values of a slice in shared memory. Every thread puts its own rows there and reads no others', so there are
// no barriers for it.
#pragma once

#include <cuda_pipeline.h>

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

template <typename T, int kVector>
class Tile {
 public:
  using V = Vector<T, kVector>;

  // The tensor-th tile of the block.
  __device__ Tile(const Plan& plan, size_t tiles_begin, int tensor)
      : own_(reinterpret_cast<V*>(shared_memory<unsigned char>() + tiles_begin) +
             tensor * plan.kept_rows * plan.threads + threadIdx.x),
        threads_(plan.threads) {}

  // Row `i` of the thread is to be what lies at p; it is there after wait().
  __device__ void fetch(int i, const T* p) const {
    V* to = own_ + i * threads_;
    if constexpr (sizeof(V) >= 4) {
      __pipeline_memcpy_async(to, p, sizeof(V));
    } else {
      *to = load_last<kVector>(p);
    }
  }
  static __device__ void wait() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    asm volatile("" ::: "memory");  // nothing is read before: CUDA's own wait does not say so to the compiler
  }
  __device__ const V& operator[](int i) const { return own_[i * threads_]; }

 private:
  V* own_;
  int threads_;
};

}  // namespace bn_ext::cuda
