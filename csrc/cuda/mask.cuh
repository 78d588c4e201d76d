// Masks: a bit for each value, in the order in which values lie in memory.
#pragma once

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

// The bits of a vector of up to eight values, the first one's lowest, and others above them. A vector's offset is a
// multiple of its size, so its bits lie in one byte.
inline __device__ unsigned load_bits(const uint8_t* mask, int64_t offset) {
  return unsigned{load<1>(mask + (offset >> 3)).value(0)} >> (offset & 7);
}

// The word that has them, whatever address the mask begins at, and where they begin in it. A mask's tensor goes on to
// the end of its last word: mask_bytes of params.h.
inline __device__ const unsigned* word_of_bits(const uint8_t* mask, int64_t offset) {
  return reinterpret_cast<const unsigned*>(reinterpret_cast<uint64_t>(mask + (offset >> 3)) & ~uint64_t{3});
}
inline __device__ unsigned bit_in_word(const uint8_t* mask, int64_t offset) {
  return static_cast<unsigned>(reinterpret_cast<uint64_t>(mask) * 8 + offset) % 32;
}

// Stores the bits of a vector; other bits are zero. All threads of a block's slice must call it with each of their
// rows.
//
// Where no two slices share a byte, adjacent lanes put it together. They are kLanes that begin at a multiple of kLanes,
// so in one warp, and come here together, for they have equally many rows: where columns are several they are in one
// row of threads, whose columns are a multiple of kLanes; where there is one column their rows are adjacent, and a
// segment's rows and row_lanes are multiples of kLanes, as those of an image are.
//
// Elsewhere words of several threads are OR-ed together, in any order, in a mask that was zero before.
template <int kVector>
__device__ void store_bits(const Plan& plan, uint8_t* mask, int64_t offset, unsigned bits) {
  static_assert(kVector <= 8);
  if (!plan.whole_bytes) {
    if (bits != 0) atomicOr(reinterpret_cast<unsigned*>(mask) + (offset >> 5), bits << (offset & 31));
    return;
  }
  constexpr int kLanes = 8 / kVector;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if constexpr (kLanes > 1) {
    const unsigned lanes_of_byte = ((1u << kLanes) - 1) << lane / kLanes * kLanes;
    bits <<= lane % kLanes * kVector;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      bits |= __shfl_xor_sync(lanes_of_byte, bits, distance);
    }
  }
  if (lane % kLanes == 0) store_last(mask + (offset >> 3), Vector<uint8_t, 1>::of({static_cast<uint8_t>(bits)}));
}

}  // namespace bn_ext::cuda
