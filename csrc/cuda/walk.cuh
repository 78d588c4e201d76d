// A thread's way through the tensor, as the plan lays it out.
#pragma once

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Calls body(number of rows, rows done before) until none is left: kChunk at a time, which a thread reads before it
// uses the first one, so that the memory's latency is hidden; then half as many, until there is one left or none.
template <int kChunk, typename Body>
__device__ void in_chunks(int left, const Body& body, int done = 0) {
  for (; left >= kChunk; left -= kChunk, done += kChunk) body(Int<kChunk>{}, done);
  if constexpr (kChunk > 1) in_chunks<kChunk / 2>(left, body, done);
}

// Rows in a chunk of so many bytes of each tensor: fewer where they are narrow, and one at least.
template <typename Vector, int kBytes>
constexpr int kChunkRows = std::max(1, kBytes / std::max(4, static_cast<int>(sizeof(Vector))));

// The slice and segment of a block.
struct Block {
  int64_t slice;
  int64_t segment;
};

// Where no blocks work together, neighbours in the grid are neighbours in memory.
inline __device__ Block block_of(const Plan& plan, unsigned index) {
  const unsigned slices = static_cast<unsigned>(plan.slices);
  return {index % slices, index / slices};
}

// How many of a segment's rows fall to the `row_lane`-th row of threads.
inline __device__ int rows_of_lane(const Plan& plan, int segment_rows, int row_lane) {
  return (segment_rows - row_lane + plan.row_lanes - 1) / plan.row_lanes;
}

// The same for plan.warp_rows rows of threads, or what is left of them, from that one on.
inline __device__ int rows_of_warp_lanes(const Plan& plan, int segment_rows, int row_lane) {
  const int lanes = min(plan.warp_rows, plan.row_lanes - row_lane);
  // Only the last segment takes a division.
  const bool is_full = segment_rows == plan.segment_rows();
  const int most = plan.rows_per_thread, rounds_of_full = most - (most * plan.row_lanes > segment_rows);
  const int rounds = is_full ? rounds_of_full : segment_rows / plan.row_lanes;
  const int rest = segment_rows - rounds * plan.row_lanes;
  return lanes * rounds + min(max(rest - row_lane, 0), lanes);
}

// The rows of one thread: `rows` of them, and where the vector of the current one is: its address in the tensor that
// the walk goes through, by which it is found in the others too. Backwards, the last row is first.
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
    // A thread takes few steps: an image's end that is further off than they reach need not be exact.
    left_ = static_cast<int>(min(kBackwards ? position + 1 : plan.image_rows - position, kFar));
    image_rows_ = static_cast<int>(min(plan.image_rows, kFar));
  }

  // The address of that row in another tensor, and its number of values from the beginning of each.
  __device__ T* in(void* tensor, uint64_t row) const { return reinterpret_cast<T*>(row + (address(tensor) - begin_)); }
  __device__ const T* in(const void* tensor, uint64_t row) const {
    return reinterpret_cast<const T*>(row + (address(tensor) - begin_));
  }
  __device__ int64_t offset(uint64_t row) const { return static_cast<int64_t>((row - begin_) / sizeof(T)); }

  __device__ void next(const Plan& plan) {
    at += (kBackwards ? -plan.step_offset : plan.step_offset) * int(sizeof(T));
    if constexpr (kOneChannel) {  // else an image has one row, by choose_narrow_planes
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
  uint64_t begin_;  // the tensor's address
  int left_;        // rows until the image's end, or its beginning
  int image_rows_;
};

// Asks for a walk's next rows of another tensor.
template <typename Walk>
__device__ void prefetch_rows(const Plan& plan, Walk walk, const void* tensor, int rows) {
  for (; rows > 0; --rows) {
    prefetch(walk.in(tensor, walk.at));
    walk.next(plan);
  }
}

// Fills `coefficients` with those of the channel of each value of a thread's vectors, or of all, out of those of its
// slice.
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

// Fills `coefficients` with make(channel, is_first) for the channel of each value of a thread's vectors, or of all.
// Where they are several the block's threads make them together, by way of shared memory, so all must call this.
// is_first: for one of the calls for a channel in the whole grid, or for several that are alike.
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
    __syncthreads();  // before anything else is put there
  }
}

}  // namespace bn_ext::cuda
