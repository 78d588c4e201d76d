// A thread's path through the tensor, by the plan, and the coefficients of its channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Calls body(number of rows, rows done before) for `left` rows in chunks of kChunk, and for the rest in chunks of half
// that size, and so on. A thread loads a whole chunk before it uses the first row, which hides memory latency.
template <int kChunk, typename Body>
__device__ void in_chunks(int left, const Body& body, int done = 0) {
  for (; left >= kChunk; left -= kChunk, done += kChunk) body(Int<kChunk>{}, done);
  if constexpr (kChunk > 1) in_chunks<kChunk / 2>(left, body, done);
}

// The rows of a chunk with kBytes bytes of each tensor: at least one, and fewer than fit if accesses are under 4 bytes.
template <typename Vector, int kBytes>
constexpr int kChunkRows = std::max(1, kBytes / std::max(4, static_cast<int>(sizeof(Vector))));

// The slice and segment of a block.
struct Block {
  int64_t slice;
  int64_t segment;
};

// On the multi-kernel path, adjacent blocks of the grid process adjacent memory.
inline __device__ Block block_of(const Plan& plan, unsigned index) {
  const unsigned slices = static_cast<unsigned>(plan.slices);
  return {index % slices, index / slices};
}

// The number of a segment's rows that the threads of row `row_lane` process.
inline __device__ int rows_of_lane(const Plan& plan, int segment_rows, int row_lane) {
  return (segment_rows - row_lane + plan.row_lanes - 1) / plan.row_lanes;
}

// The same, in total, for the up to plan.warp_rows rows of threads that begin with `row_lane`.
inline __device__ int rows_of_warp_lanes(const Plan& plan, int segment_rows, int row_lane) {
  const int lanes = min(plan.warp_rows, plan.row_lanes - row_lane);
  // Only the last segment needs a division.
  const bool is_full = segment_rows == plan.segment_rows();
  const int most = plan.rows_per_thread, rounds_of_full = most - (most * plan.row_lanes > segment_rows);
  const int rounds = is_full ? rounds_of_full : segment_rows / plan.row_lanes;
  const int rest = segment_rows - rounds * plan.row_lanes;
  return lanes * rounds + min(max(rest - row_lane, 0), lanes);
}

// Iterates over the `rows` rows of one thread. `at` is the address of the thread's vector in the current row of
// `tensor`; in() converts it for other tensors. A backward walk starts with the last row.
template <typename T, bool kBackwards, bool kOneChannel>
class Walk {
 public:
  int column;
  int row_lane;
  int rows;
  uint64_t at;

  __device__ Walk(const Plan& plan, const Block& block, const void* tensor)
      : column(static_cast<int>(threadIdx.x) % plan.columns),
        row_lane(static_cast<int>(threadIdx.x) / plan.columns),
        begin_(reinterpret_cast<uint64_t>(tensor)) {
    const int64_t in_image = block.slice * plan.slice_width + column * plan.vector;
    const bool inside = row_lane < plan.row_lanes && in_image < plan.pitch;
    rows = inside ? rows_of_lane(plan, plan.rows_of(block.segment), row_lane) : 0;
    const int64_t first_row = block.segment * plan.segment_rows() + row_lane;
    const int64_t row = kBackwards && rows > 0 ? first_row + int64_t(rows - 1) * plan.row_lanes : first_row;
    const int64_t position = row % plan.image_rows;
    at = begin_ + (row / plan.image_rows * plan.pitch + in_image + position * plan.vector) * sizeof(T);
    // A thread takes few steps, so a distance to the end of the image that exceeds them all need not be exact.
    left_ = static_cast<int>(min(kBackwards ? position + 1 : plan.image_rows - position, kFar));
    image_rows_ = static_cast<int>(min(plan.image_rows, kFar));
  }

  // The address of a row in another tensor, and the row's offset in values from the beginning of any tensor.
  __device__ T* in(void* tensor, uint64_t row) const { return reinterpret_cast<T*>(row + (address(tensor) - begin_)); }
  __device__ const T* in(const void* tensor, uint64_t row) const {
    return reinterpret_cast<const T*>(row + (address(tensor) - begin_));
  }
  __device__ int64_t offset(uint64_t row) const { return static_cast<int64_t>((row - begin_) / sizeof(T)); }

  __device__ void next(const Plan& plan) {
    at += (kBackwards ? -plan.step_offset : plan.step_offset) * int(sizeof(T));
    if constexpr (kOneChannel) {  // otherwise an image has one row (choose_narrow_planes)
      left_ -= plan.step_rows;
      if (left_ <= 0) {
        left_ += image_rows_;
        at += (kBackwards ? -plan.wrap_offset : plan.wrap_offset) * int(sizeof(T));
      }
    }
  }

 private:
  static __device__ uint64_t address(const void* tensor) { return reinterpret_cast<uint64_t>(tensor); }

  static constexpr int64_t kFar = 1 << 30;
  uint64_t begin_;  // the address of the tensor
  int left_;        // rows up to the end of the image, or backwards up to its beginning
  int image_rows_;
};

// Prefetches the next `rows` rows of a walk in another tensor to the L2 cache.
template <typename Walk>
__device__ void prefetch_rows(const Plan& plan, Walk walk, const void* tensor, int rows) {
  for (; rows > 0; --rows) {
    prefetch(walk.in(tensor, walk.at));
    walk.next(plan);
  }
}

// Selects from the coefficients of a slice those for each value of a thread's vectors, or the one for all values.
template <int kVector, bool kOneChannel, typename Walk, typename Coefficients, int kCount>
__device__ void pick_coefficients(const Plan& plan,
                                  const Walk& walk,
                                  const Coefficients* of_slice,
                                  Coefficients (&coefficients)[kCount]) {
  static_assert(kCount == (kOneChannel ? 1 : kVector));
  if (walk.rows == 0) return;
  int channel = walk.column * kVector / plan.plane;
  int position = walk.column * kVector % plan.plane;
#pragma unroll
  for (Coefficients& coefficient : coefficients) {
    coefficient = of_slice[channel];
    if (++position == plan.plane) {
      position = 0;
      ++channel;
    }
  }
}

// Sets `coefficients` to make(channel, is_first) for each value of a thread's vectors, or for all values. If a slice
// has several channels, the threads of the block compute them together and share them in shared memory, so all threads
// must call this. is_first is true in one call per channel and grid, or in several calls with equal results.
template <int kVector, bool kOneChannel, typename Walk, typename Coefficients, int kCount, typename Make>
__device__ void make_coefficients(
    const Plan& plan, const Block& block, const Walk& walk, Coefficients (&coefficients)[kCount], const Make& make) {
  static_assert(kCount == (kOneChannel ? 1 : kVector));
  const int64_t first_channel = block.slice * plan.slice_channels;
  if constexpr (kOneChannel) {
    const int64_t channel = first_channel + walk.column * kVector / plan.plane;
    if (walk.rows > 0) coefficients[0] = make(channel, block.segment == 0 && walk.row_lane == 0);
  } else {
    Coefficients* of_slice = shared_memory<Coefficients>();
    const int channels = plan.channels_of(block.slice);
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads) {
      of_slice[i] = make(first_channel + i, block.segment == 0);
    }
    __syncthreads();
    pick_coefficients<kVector, kOneChannel>(plan, walk, of_slice, coefficients);
    __syncthreads();  // before this memory is reused
  }
}

}  // namespace bn_ext::cuda
