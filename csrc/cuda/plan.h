// The launch plan: how the threads of a grid divide a tensor. The host computes it from numbers only; kernels read it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace bn_ext::cuda {

constexpr int kMaxThreads = 256;   // per block
constexpr int kBlocksAtATime = 3;  // per multiprocessor on the multi-kernel path: the kernels' registers allow no more
constexpr int kResidentAtATime = 2;     // the same on the single-pass path: while one waits, the other one moves data
constexpr int kMaxRowsPerThread = 256;  // limits the length of float32 sums

// The forms that kernels are compiled for.
enum class Variant {
  kPlain,     // no activation, no residual
  kRelu,      // relu with 16-byte accesses; no residual, no mask, no dz
  kReluLike,  // a relu-like activation or none, with or without residual
  kAny,       // any other activation, selected at run time for the whole grid, with or without residual
};

constexpr Variant variant_of(const Activation& activation, bool is_alone) {
  const bool is_relu = activation.alpha == 0 && activation.upper != activation.upper;
  if (activation.kind == ActivationKind::kNone) return is_alone ? Variant::kPlain : Variant::kReluLike;
  if (activation.kind != ActivationKind::kReluLike) return Variant::kAny;
  return is_relu && is_alone ? Variant::kRelu : Variant::kReluLike;
}
constexpr Variant variant_of(const ForwardParams& p) {
  return variant_of(p.activation, p.z == nullptr && p.mask == nullptr);
}
constexpr Variant variant_of(const BackwardParams& p) {
  return variant_of(p.activation, p.z == nullptr && p.mask == nullptr && p.dz == nullptr);
}

// The most values per access in the kernels of kAny: its formulas need the other registers.
constexpr int most_values_of_any(int value_bytes) { return value_bytes == 8 ? 1 : 4; }

// When teams of slices with several channels are limited to half of the resident blocks, so that one team reads while
// another one writes. Such slices may be half a cache line wide.
enum class HalfChip : int { kNever, kIfFaster, kAlways };

// The properties of the GPU and the user's choices that a plan depends on.
struct Machine {
  int multiprocessors;
  int shared_bytes = 0;      // per multiprocessor, for all its blocks
  bool clusters = false;     // whether it supports clusters
  bool cooperative = false;  // whether it supports cooperative grids
  bool pdl = false;          // whether it supports PDL, and PDL is not disabled
  // Choices for BN_EXT_CUDA_TUNING. The defaults follow the model of plan_teams.cpp.
  bool staggers = true;                      // half of the teams start later
  int prefetched_quarters = 2;               // of a team's next slice, prefetched to the L2 cache while the team waits
  HalfChip half_chip = HalfChip::kIfFaster;  // decided by the model
  bool evict_last = true;                    // spilled rows are evict-last until their second read
  bool keep_results = true;                  // small results stay in the L2 cache
  bool three_kernels = true;                 // the multi-kernel path is allowed if the model finds it faster than teams

  constexpr Machine without_teams() const {
    Machine machine = *this;
    machine.shared_bytes = 0;
    machine.clusters = machine.cooperative = false;
    return machine;
  }
};

// Excludes teams larger than `largest`: "none", "block", "cluster" or "grid". Returns false for any other name.
bool limit_teams(const char* largest, Machine& machine);

// "0" disables PDL; "1" keeps it if the machine supports it. Returns false for any other choice.
bool choose_pdl(const char* choice, Machine& machine);

// Applies settings such as "stagger=0,prefetch=0.25", in any order. Returns false for an unknown name or value.
bool tune(const char* choices, Machine& machine);

constexpr int kMaxClusterBlocks = 8;  // supported by every device that has clusters

// The blocks that together hold a slice on chip between the two uses of its values, so that the pass is one kernel.
enum class Team : int {
  kNone,     // no slice stays on chip: the multi-kernel path
  kBlock,    // one block
  kCluster,  // a cluster, whose blocks access each other's shared memory
  kGrid,     // a part of a cooperative grid; its teams process slice after slice
};

// L2 cache policies of loads and stores: ptxas's encodings of createpolicy results that apply to all accesses.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;
constexpr uint64_t kEvictNormal = 0x16F0000000000000;

constexpr int kMaskWordBytes = 4;  // the smallest asynchronous copy to a tile, and the unit of atomics

// The kernels see one layout: images of C planes of P values. A channels_last tensor has it with P = 1, if each of its
// N * S positions counts as an image.
//
// The tensor is cut into slices of whole adjacent channels, and a slice into segments, one block each. The threads of a
// block form a (row_lanes, columns) array. A thread owns the `vector` adjacent values of its column and walks down the
// rows of its segment. There are two arrangements:
//   wide planes     a slice is one channel, a row is one vector of it: columns = 1, image_rows = P / vector
//   narrow planes   a slice is several channels, a row is their values in one image: columns = slice_width / vector,
//                   image_rows = 1
struct Plan {
  int64_t channels;
  int64_t pitch;        // values from one image to the next: C * P
  int64_t slice_width;  // values of a slice in one image; the last slice may have fewer
  int64_t slices;
  int64_t rows;             // per slice
  int64_t image_rows;       // per image
  int64_t segments;         // per slice: the number of blocks of its team
  int64_t rows_of_segment;  // the last segment may have fewer
  int64_t teams;            // in the grid: one per slice, except for kGrid
  int64_t teams_at_a_time;  // for which the machine has room
  int64_t step_offset;      // values from a thread's row to its next row, `row_lanes` further, in the same image
  int64_t wrap_offset;      // values to add if that step passes the last row of the image
  uint64_t result_policy;   // kEvictNormal if results shall stay in the L2 cache for the next operator, or kEvictFirst
  int step_rows;            // rows of an image by which a step moves on
  int vector;               // values per access
  int columns;              // vectors per row
  int row_lanes;            // rows that the threads of a block process at the same time
  int rows_per_thread;      // at most; some threads have one fewer
  int kept_rows;            // per thread, at most, which stay on chip
  int threads;              // per block: columns * row_lanes, and idle ones that fill the last warp
  int slice_channels;       // per slice; the last slice may have fewer
  int plane;                // P, but at most 2^30, which no slice of several channels reaches
  int row_values;           // values of a channel in a row: P, or `vector` if a slice is one channel
  int pieces;               // channels that the values of one vector belong to, at most
  int warp_rows;            // rows of threads whose sums a warp merges before it stores them, a power of two
  int merge_lanes;          // threads that merge the partial sums of one channel, a power of two <= 32
  int team_lanes;           // the same for a channel's sums of all segments
  int staggered_teams;      // teams that start later, after as many that do not
  int stagger_ns;           // their delay; 0: all teams start at once
  int prefetched_rows;      // per thread, of a team's next slice
  Team team;
  bool uses_pdl;     // kernels are launched with PDL
  bool one_channel;  // all values of a thread belong to one channel
  bool whole_bytes;  // a slice's rows cover whole bytes of the mask, so that no two slices share a byte
  bool keeps_mask;   // a tile also holds the mask bits of kept rows: for each vector, the word that contains them
  bool evicts_last;  // spilled rows are evict-last until their second read

  constexpr bool single_pass() const { return team != Team::kNone; }
  constexpr bool blocks_wait() const { return team == Team::kCluster || team == Team::kGrid; }  // for each other
  constexpr int64_t blocks() const { return teams * segments; }
  constexpr int64_t segment_rows() const { return rows_of_segment; }
  // The number of rows of a segment.
  constexpr int rows_of(int64_t segment) const {
    const int64_t left = rows - segment * segment_rows();
    return static_cast<int>(left < segment_rows() ? left : segment_rows());
  }
  // The number of channels of a slice.
  constexpr int channels_of(int64_t slice) const {
    const int64_t left = channels - slice * slice_channels;
    return static_cast<int>(left < slice_channels ? left : slice_channels);
  }
  // The number of a slice's rows that do not stay on chip.
  constexpr int64_t spilled_rows() const {
    if (!single_pass()) return rows;
    const int64_t most = int64_t(row_lanes) * kept_rows, last = rows_of(segments - 1);
    const int64_t kept = segment_rows() < most ? segment_rows() : most;
    return rows - (segments - 1) * kept - (last < kept ? last : kept);
  }
  // Shared memory for one kept row of every thread, of `tensors` tensors.
  constexpr int64_t kept_row_bytes(int tensors, int64_t value_bytes) const {
    return threads * (tensors * vector * value_bytes + (keeps_mask ? kMaskWordBytes : 0));
  }
  // The number of a channel's values in a segment.
  constexpr double values_of(int64_t segment) const { return double(rows_of(segment)) * row_values; }
  // The layout of the partial sums that a block stores in shared memory, with gaps: the distance between vectors, the
  // distance between rows (odd), the number of rows, and the total.
  constexpr int pieces_stride() const { return pieces > 2 ? pieces + 1 : pieces; }
  constexpr int partials_stride() const { return columns * pieces_stride() | 1; }
  constexpr int partial_rows() const { return (row_lanes + warp_rows - 1) / warp_rows; }
  constexpr int block_partials() const { return partial_rows() * partials_stride(); }
  // Whether each block of a team merges the sums of all blocks, which saves the wait for the peers' coefficients. It
  // does if each thread has at most four sums to load.
  constexpr bool every_block_merges() const { return segments == 1 || segments * slice_channels <= 4 * threads; }
  // The number of channels whose coefficients the threads of a block share in shared memory.
  constexpr int block_coefficients() const { return one_channel ? 0 : slice_channels; }
};

// The shared memory of a block on the single-pass path, as offsets in bytes: first the values that its threads share
// with each other, then the coefficients of the slice's channels, the block's sums of them for its team, and the tile.
struct SinglePassMemory {
  size_t coefficients;
  size_t sums;
  size_t tiles;
  size_t bytes;  // total

  constexpr SinglePassMemory(const Plan& plan, int tensors, size_t value_bytes)
      : coefficients(0), sums(0), tiles(0), bytes(0) {
    const size_t number_bytes = value_bytes == 8 ? 8 : 4;  // per coefficient
    const size_t partial_bytes = plan.block_partials() * 2 * sizeof(double);
    const size_t affine_bytes = plan.slice_channels * 3 * number_bytes;
    coefficients = round_up(partial_bytes > affine_bytes ? partial_bytes : affine_bytes);
    sums = round_up(coefficients + affine_bytes);
    tiles = sums + plan.slice_channels * 2 * sizeof(double);
    bytes = tiles + plan.kept_rows * plan.kept_row_bytes(tensors, value_bytes);
  }

 private:
  static constexpr size_t round_up(size_t size) { return (size + 15) / 16 * 16; }
};

// The global memory of one team of a grid, as offsets in bytes: the sums (slice_channels, segments) of its blocks, in
// two buffers for even and odd slices, and the coefficients of the slice's channels.
struct TeamWorkspace {
  size_t sums;  // of one buffer
  size_t coefficients;
  size_t bytes;  // per team

  constexpr explicit TeamWorkspace(const Plan& plan)
      : sums(plan.slice_channels * plan.segments * 2 * sizeof(double)), coefficients(2 * sums), bytes(0) {
    bytes = (coefficients + plan.slice_channels * 3 * sizeof(double) + 127) / 128 * 128;
  }
};

constexpr size_t workspace_of_teams(const Plan& plan) {
  return plan.team == Team::kGrid ? plan.teams * TeamWorkspace(plan).bytes : 0;
}

// The number of arrivals of a team's blocks at waits, and of blocks that have finished. Each team has a cache line.
struct alignas(128) TeamCounters {
  unsigned arrivals;
  unsigned leavers;
};

constexpr size_t counter_bytes(const Plan& plan) {
  return plan.team == Team::kGrid ? plan.teams * sizeof(TeamCounters) : 0;
}

// Device memory that a pass needs while it runs. `memory` is aligned to 16 bytes, `counters` to 128.
struct Workspace {
  void* memory;            // uninitialised
  TeamCounters* counters;  // zero before and after each pass, so that consecutive passes may share them
};

// The number of threads that merge `partials` partial sums: the least power of two that is not smaller, at most 32.
int merge_lanes(int64_t partials);
// The number of blocks of kMaxThreads threads that `groups` groups of `lanes` threads need.
int64_t blocks_of_groups(int64_t groups, int lanes);

// The input of make_plan besides the machine.
struct Request {
  Shape shape;
  int value_bytes;
  int alignment;            // bytes, a power of two that divides the address of every activation tensor
  bool for_mask;            // a slice's rows shall cover whole bytes of a mask, if possible
  int single_pass_tiles;    // tensors of which a team would keep slices; 0: no teams
  bool keeps_mask = false;  // a team would also keep the mask bits
};

int value_bytes(DType dtype);

constexpr int kWidestAccess = 16;  // bytes, of one thread

// The variant of the kernels that a pass takes.
template <typename Params>
Variant variant_of(const Params& p, const Plan& plan) {
  const Variant variant = variant_of(p);
  const bool is_wide = plan.vector * value_bytes(p.dtype) == kWidestAccess;
  return variant == Variant::kRelu && !is_wide ? Variant::kReluLike : variant;
}

// The number of tensors of which a team keeps slices in this pass; 0 if the pass needs the multi-kernel path.
int single_pass_tiles(const ForwardParams& p);
int single_pass_tiles(const BackwardParams& p);

Plan make_plan(const Request& request, const Machine& machine);
Plan plan_forward(const ForwardParams& p, const Machine& machine);
Plan plan_backward(const BackwardParams& p, const Machine& machine);

// The rest of a multi-kernel backward pass after its sums: in training dx, computed from dz instead of dy and z if dz
// equals g to the bit.
BackwardParams after_sums(BackwardParams p);

}  // namespace bn_ext::cuda
