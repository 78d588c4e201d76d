// Masks: one bit per value, in memory order.
#pragma once

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

// Returns the bits of a vector of up to eight values, the first value's bit lowest; higher bits are undefined. The
// offset of a vector is a multiple of its size, so its bits lie in one byte.
inline __device__ unsigned load_bits(const uint8_t* mask, int64_t offset) {
  return unsigned{load<1>(mask + (offset >> 3)).value(0)} >> (offset & 7);
}

// The aligned word that contains these bits, for any address of the mask, and the index of the first bit in it. The
// memory of a mask extends to the end of its last word (mask_bytes in params.h).
inline __device__ const unsigned* word_of_bits(const uint8_t* mask, int64_t offset) {
  return reinterpret_cast<const unsigned*>(reinterpret_cast<uint64_t>(mask + (offset >> 3)) & ~uint64_t{3});
}
inline __device__ unsigned bit_in_word(const uint8_t* mask, int64_t offset) {
  return static_cast<unsigned>(reinterpret_cast<uint64_t>(mask) * 8 + offset) % 32;
}

// Stores the bits of a vector; higher bits of `bits` must be zero. Every thread of the block that has rows must call
// this for each of its rows.
//
// If no two slices share a byte, kLanes adjacent lanes assemble it. The first lane is a multiple of kLanes, so they are
// in one warp. They call this together because they have equally many rows. With several columns, they are in one row
// of threads, and `columns` is a multiple of kLanes. With one column, their rows are adjacent, and row_lanes and the
// numbers of rows of a segment and of an image are multiples of kLanes.
//
// Otherwise atomics OR the bits into the mask, which must be zero before, in any order.
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
