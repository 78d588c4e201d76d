// How the threads of a grid share a tensor: decided on the host, from numbers only, and read by every kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace bn_ext::cuda {

constexpr int kMaxThreads = 256;        // of a block
constexpr int kBlocksAtATime = 3;       // of so many threads, on a multiprocessor: what the kernels' registers allow
constexpr int kMaxRowsPerThread = 256;  // float32 sums stay short

// What a kernel is compiled for.
enum class Variant {
  kPlain,     // no activation, no residual
  kReluLike,  // one of that kind, or none; with a residual or without
  kAny,       // any other, chosen at run time, alike for the whole grid; with a residual or without
};

constexpr Variant variant_of(const Activation& activation, const void* z) {
  if (activation.kind == ActivationKind::kNone) return z == nullptr ? Variant::kPlain : Variant::kReluLike;
  return activation.kind == ActivationKind::kReluLike ? Variant::kReluLike : Variant::kAny;
}

// Values of one access in kAny's kernels, at most: its formulas leave registers for no more.
constexpr int most_values_of_any(int value_bytes) { return value_bytes == 8 ? 1 : 4; }

// What the plan depends on besides the tensor.
struct Machine {
  int multiprocessors;
  int shared_bytes = 0;  // of a multiprocessor, for all its blocks
};

// A channels_last tensor is a contiguous (N, C, P) tensor with P = 1 and a position for an image; so there is one
// layout: images of C planes of P values.
//
// The tensor is cut into slices of whole adjacent channels, and a slice into segments, one block each. A block's
// threads stand side by side in `columns` and behind each other in `row_lanes`; a thread owns the `vector` adjacent
// values of its column and walks down the rows of its segment. There are two ways to lay that out:
//   planes wide enough    a slice is one channel, a row one vector of it: columns = 1, image_rows = P / vector
//   narrow planes         a slice is some channels, a row their values in one image: columns = slice_width / vector,
//                         image_rows = 1
struct Plan {
  int64_t channels;
  int64_t pitch;        // values from one image to the next, C * P
  int64_t slice_width;  // values of a slice in one image; the last slice may have fewer
  int64_t slices;
  int64_t rows;          // of a slice
  int64_t image_rows;    // of one image
  int64_t segments;      // of a slice
  int64_t step_offset;   // values from a thread's row to its next one, `row_lanes` further, in the same image ...
  int64_t wrap_offset;   // ... and what comes on top when that is past the image's last row
  int step_rows;         // by how many rows of an image that step moves on
  int vector;            // values of one access
  int columns;           // vectors side by side
  int row_lanes;         // threads behind each other
  int rows_per_thread;   // at most
  int threads;           // of a block: columns * row_lanes, and some idle ones to fill the last warp
  int slice_channels;    // of a slice; the last one may have fewer
  int plane;             // P; no more than 2^30 is told, which no slice of several channels has
  int partials_per_row;  // of a channel, that one row of threads makes: 1, or P where columns are values
  int partial_values;    // of a channel in one row, that one such partial sums up
  int merge_lanes;       // threads that together merge the partials of a channel, a power of two <= 32
  bool one_channel;      // all values of a thread belong to one channel
  bool whole_bytes;      // rows of slices are whole bytes of a mask, in memory: no two slices share one
  bool resident;         // the only segment of a slice stays in its block's shared memory: one kernel does the pass

  constexpr int64_t blocks() const { return slices * segments; }
  constexpr int64_t segment_rows() const { return int64_t(row_lanes) * rows_per_thread; }  // the last has fewer
  // How many rows a segment has.
  constexpr int rows_of(int64_t segment) const {
    const int64_t left = rows - segment * segment_rows();
    return static_cast<int>(left < segment_rows() ? left : segment_rows());
  }
  // Values of a channel in a segment.
  constexpr double values_of(int64_t segment) const {
    return double(rows_of(segment)) * partials_per_row * partial_values;
  }
  // Partials that a block's threads leave in shared memory, with gaps: of a row of threads, an odd number, and of all.
  constexpr int partials_stride() const { return columns * (one_channel ? 1 : vector + 1) | 1; }
  constexpr int block_partials() const { return row_lanes * partials_stride(); }
  // Channels whose coefficients they share there.
  constexpr int block_coefficients() const { return one_channel ? 0 : slice_channels; }
};

// Where things lie in the shared memory of a resident block, in bytes: first what threads leave for each other, then
// coefficients of the slice's channels, then a tile for each of some tensors.
struct ResidentMemory {
  size_t coefficients;
  size_t tiles;
  size_t bytes;  // in all

  constexpr ResidentMemory(const Plan& plan, int tensors, size_t value_bytes) : coefficients(0), tiles(0), bytes(0) {
    const size_t number_bytes = value_bytes == 8 ? 8 : 4;  // of a coefficient
    const size_t partial_bytes = plan.block_partials() * 2 * sizeof(double);
    const size_t affine_bytes = plan.slice_channels * 3 * number_bytes;
    coefficients = round_up(partial_bytes > affine_bytes ? partial_bytes : affine_bytes);
    tiles = round_up(coefficients + affine_bytes);
    bytes = tiles + size_t(plan.threads) * plan.rows_per_thread * plan.vector * value_bytes * tensors;
  }

 private:
  static constexpr size_t round_up(size_t size) { return (size + 15) / 16 * 16; }
};

// Threads of a warp that together merge so many partials: a power of two, one each as far as they go round.
int merge_lanes(int64_t partials);
// Blocks of kMaxThreads that make up `groups` groups of `lanes` threads.
int64_t blocks_of_groups(int64_t groups, int lanes);

// `alignment`: bytes, a power of two that divides every activation's address. `for_mask`: whole bytes, if possible.
Plan make_plan(const Shape& shape, int value_bytes, int alignment, bool for_mask, const Machine& machine);
Plan plan_forward(const ForwardParams& p, const Machine& machine);
Plan plan_backward(const BackwardParams& p, const Machine& machine);

}  // namespace bn_ext::cuda
