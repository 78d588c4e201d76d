// The kept rows of a block's segment in shared memory. Every thread copies its own rows there and reads no others, so
// no barriers are needed.
#pragma once

#include <cuda_pipeline.h>

#include "launch.cuh"
#include "mask.cuh"
#include "plan.h"
#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Copies 16 bytes to shared memory asynchronously.
inline __device__ void copy_async(void* shared, const void* global, uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "l"(policy)
               : "memory");
#else
  __pipeline_memcpy_async(shared, global, 16);
#endif
}

// Consecutive rows of a thread: the index of the first one in the tile, and their number.
struct Stage {
  int begin;
  int rows;
};

// The stages of a thread's rows, in memory order. If all rows fit, one stage has them all and the other one is empty.
// Otherwise each pair of stages has kept_rows rows: whole groups in the first one, the rest in the second one. The
// first pair has the remaining rows. The tile holds two stages: one is in flight while the other one is read. The last
// two stages stay. A stage may be empty.
class Stages {
 public:
  int count;  // even

  __device__ Stages(int rows, int kept_rows, int group_rows) : kept_rows_(kept_rows) {
    const int times = rows > kept_rows ? (rows - 1) / kept_rows : 0;
    count = 2 * times + 2;
    first_rows_ = rows - times * kept_rows;
    part_ = times == 0 ? kept_rows : (kept_rows / 2 + group_rows - 1) / group_rows * group_rows;
  }

  __device__ Stage operator[](int i) const {
    if (i < 0 || i >= count) return {0, 0};
    const int rows = i < 2 ? first_rows_ : kept_rows_;
    return i % 2 == 0 ? Stage{0, min(rows, part_)} : Stage{part_, max(rows - part_, 0)};
  }
  __device__ bool stays(int i) const { return i >= count - 2; }

 private:
  int kept_rows_;
  int first_rows_;  // of the first two stages
  int part_;        // the most rows of the first stage of a pair
};

// Holds rows of kTensors tensors and their bits of a mask. A thread's rows pass through the tile in stages, first
// forwards and then, beginning with the last two stages, which have stayed, backwards. When a stage has been read, the
// second stage after it is fetched to its place.
//
// Copies are committed in groups, so that a thread can read rows while later rows are in flight. A wait instruction
// takes the number of groups that may still be pending as a constant. Each stage has at least kGroups groups, some
// without copies if necessary; the next stage is fetched before the first group of a stage is awaited; and each wait
// commits one more group. So kLeft groups may be pending at each wait. If a stage has more groups, as with narrow
// accesses, or if waits for the stage before have committed some, groups are awaited earlier than necessary.
template <typename T, int kVector, int kTensors, bool kMasked = false>
class Tile {
 public:
  using V = Vector<T, kVector>;

  __device__ Tile(const Plan& plan, size_t begin, const void* const (&tensors)[kTensors], const uint8_t* mask = nullptr)
      : own_(shared_memory_at<unsigned char>(begin) + threadIdx.x * sizeof(V)), plan_(plan), mask_(mask) {
#pragma unroll
    for (int i = 0; i < kTensors; ++i) tensors_[i] = tensors[i];
  }

  template <int kGroupRows>
  __device__ Stages stages(int rows) const {
    return Stages(rows, plan_.kept_rows, kGroupRows);
  }

  // Fetch the first two stages, or stage i. Each wait_for_group() makes the next kGroupRows rows available.
  template <int kGroupRows, bool kOneChannel>
  __device__ void fetch_first(Walk<T, false, kOneChannel>& walk, const Stages& stages) const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) fetch_in_groups<kGroupRows>(walk, stages, i);
  }
  template <int kGroupRows, bool kOneChannel>
  __device__ void fetch_in_groups(Walk<T, false, kOneChannel>& walk, const Stages& stages, int i) const {
    const Stage stage = stages[i];
    stages.stays(i) ? fetch<kGroupRows, true>(walk, stage) : fetch<kGroupRows, false>(walk, stage);
    for (int groups = stage.rows / kGroupRows; groups < kGroups; ++groups) __pipeline_commit();
  }
  static __device__ void wait_for_group() {
    wait_until_left<kLeft>();
    __pipeline_commit();
  }

  // On the way back, after stage i, where the walk has arrived: fetches stage i - 2 to the place of stage i.
  // wait_for_stage() makes a stage available while the next one is in flight.
  template <bool kOneChannel>
  __device__ void fetch_again(Walk<T, true, kOneChannel> walk, const Stages& stages, int i) const {
    const Stage stage = stages[i - 2];
    if (stage.rows > 0) {
#pragma unroll 1
      for (int row = stages[i - 1].rows; row > 0; --row) walk.next(plan_);
      fetch<kAllRows, true>(walk, stage);
    }
    __pipeline_commit();
  }
  static __device__ void wait_for_stage() { wait_until_left<1>(); }

  // The address of the thread's row i; the next row is row_bytes() further.
  __device__ const unsigned char* row_address(int i) const { return own_ + i * row_bytes(); }
  __device__ int row_bytes() const {
    return plan_.threads * (kTensors * kVectorBytes + (kMasked ? kMaskWordBytes : 0));
  }
  __device__ const V& row(int tensor, const unsigned char* address) const {
    return *reinterpret_cast<const V*>(address + tensor * plan_.threads * kVectorBytes);
  }
  // The mask bits of the row at `address`, which must be the walk's current row; 0 if there is no mask.
  template <typename Walk>
  __device__ unsigned passed(const Walk& walk, const unsigned char* address) const {
    if (!kMasked) return 0;
    return *reinterpret_cast<const unsigned*>(address + bits_begin()) >> bit_in_word(mask_, walk.offset(walk.at));
  }

 private:
  static constexpr int kGroups = 8;
  static constexpr int kLeft = 2 * kGroups - 1;
  static constexpr int kVectorBytes = sizeof(V);
  static constexpr int kAllRows = 0;  // one group, which the caller commits

  // The distance from a thread's values of a row to its word of the mask; the words follow the values of all threads.
  __device__ int bits_begin() const {
    return plan_.threads * kTensors * kVectorBytes - static_cast<int>(threadIdx.x) * (kVectorBytes - kMaskWordBytes);
  }
  template <int kGroupRows, bool kLast, bool kBackwards, bool kOneChannel>
  __device__ void fetch(Walk<T, kBackwards, kOneChannel>& walk, const Stage& stage) const {
    const uint64_t policy = kLast ? kEvictFirst : plan_.evicts_last ? kEvictLast : kEvictNormal;
    unsigned char* to = own_ + (kBackwards ? stage.begin + stage.rows - 1 : stage.begin) * row_bytes();
#pragma unroll 8
    for (int i = 0; i < stage.rows; ++i) {
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        copy(to + tensor * plan_.threads * kVectorBytes, walk.in(tensors_[tensor], walk.at), policy);
      }
      if (kMasked) {
        __pipeline_memcpy_async(to + bits_begin(), word_of_bits(mask_, walk.offset(walk.at)), kMaskWordBytes);
      }
      walk.next(plan_);
      to += kBackwards ? -row_bytes() : row_bytes();
      if constexpr (kGroupRows != kAllRows) {
        if (i % kGroupRows == kGroupRows - 1) __pipeline_commit();
      }
    }
  }
  template <int kCount>
  static __device__ void wait_until_left() {
    __pipeline_wait_prior(kCount);
    asm volatile("" ::: "memory");  // CUDA's wait does not keep the compiler from moving reads before it
  }
  static __device__ void copy(unsigned char* to, const T* from, uint64_t policy) {
    if constexpr (sizeof(V) == 16) {
      copy_async(to, from, policy);
    } else if constexpr (sizeof(V) >= 4) {
      __pipeline_memcpy_async(to, from, sizeof(V));
    } else {
      *reinterpret_cast<V*>(to) = load_last<kVector>(from);
    }
  }

  unsigned char* own_;
  const Plan& plan_;
  const void* tensors_[kTensors];
  const uint8_t* mask_;
};

}  // namespace bn_ext::cuda
