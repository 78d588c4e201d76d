// How the threads of a grid share a tensor: decided on the host, from numbers only, and read by every kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace bn_ext::cuda {

constexpr int kMaxThreads = 256;        // of a block
constexpr int kBlocksAtATime = 3;       // of so many threads, on a multiprocessor: what the kernels' registers allow
constexpr int kResidentAtATime = 2;     // the same of blocks that hold slices: while one waits, another one moves data
constexpr int kMaxRowsPerThread = 256;  // float32 sums stay short

// What a kernel is compiled for.
enum class Variant {
  kPlain,     // no activation, no residual
  kRelu,      // relu of the widest accesses, no residual, no mask, no dz wanted
  kReluLike,  // one of that kind, or none; with a residual or without
  kAny,       // any other, chosen at run time, alike for the whole grid; with a residual or without
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

// Values of one access in kAny's kernels, at most: its formulas leave registers for no more.
constexpr int most_values_of_any(int value_bytes) { return value_bytes == 8 ? 1 : 4; }

// When slices of several channels get teams of at most half of the resident blocks, so that one team reads while
// another one writes. Such slices may be half a cache line wide.
enum class HalfChip : int { kNever, kIfFaster, kAlways };

// What the plan depends on besides the tensor.
struct Machine {
  int multiprocessors;
  int shared_bytes = 0;      // of a multiprocessor, for all its blocks
  bool clusters = false;     // whether blocks may be launched in clusters
  bool cooperative = false;  // whether a grid's blocks may wait for each other
  bool pdl = false;          // whether a kernel may start while the one before it on the stream ends
  // By choice, for the model prefers it:
  bool staggers = true;                      // whether half of the teams begin later
  int prefetched_quarters = 2;               // of a team's next slice, which come to the L2 cache while the team waits
  HalfChip half_chip = HalfChip::kIfFaster;  // by the model
  bool evict_last = true;                    // rows that are read again stay in the L2 cache as long as it has room
  bool keep_results = true;                  // small results stay in the L2 cache
  bool three_kernels = true;                 // instead of a team, if the model says that they take less time

  constexpr Machine without_teams() const {
    Machine machine = *this;
    machine.shared_bytes = 0;
    machine.clusters = machine.cooperative = false;
    return machine;
  }
};

// Without teams larger than those of this name, "none", "block", "cluster" or "grid"; false if there is no such name.
bool limit_teams(const char* largest, Machine& machine);

// With early starts where the machine has them, "1", or without, "0"; false if the choice is neither.
bool choose_pdl(const char* choice, Machine& machine);

// By "stagger=0,prefetch=0.25", in any number and order; false if there is no such name or value.
bool tune(const char* choices, Machine& machine);

constexpr int kMaxClusterBlocks = 8;  // on every device that has clusters

// The blocks that hold a slice on chip together, between the two uses of its values, so that one kernel does the pass.
enum class Team : int {
  kNone,     // no slice stays on chip: a kernel for each use
  kBlock,    // one
  kCluster,  // a few, which see each other's shared memory
  kGrid,     // many, of a grid that is resident as a whole; its teams take slice after slice
};

// L2 cache policies of loads and stores, as ptxas encodes those of createpolicy for all accesses.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;
constexpr uint64_t kEvictNormal = 0x16F0000000000000;

constexpr int kMaskWordBytes = 4;  // the least that can be copied to a tile, and what atomics change

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
  int64_t rows;             // of a slice
  int64_t image_rows;       // of one image
  int64_t segments;         // of a slice: as many as its team has blocks
  int64_t rows_of_segment;  // the last one has fewer
  int64_t teams;            // in the grid: one for each slice, but of kGrid
  int64_t teams_at_a_time;  // that the machine has room for
  int64_t step_offset;      // values from a thread's row to its next one, `row_lanes` further, in the same image ...
  int64_t wrap_offset;      // ... and what comes on top when that is past the image's last row
  uint64_t result_policy;   // kEvictNormal if the next operator shall find results in the L2 cache, else kEvictFirst
  int step_rows;            // by how many rows of an image that step moves on
  int vector;               // values of one access
  int columns;              // vectors side by side
  int row_lanes;            // threads behind each other
  int rows_per_thread;      // at most; some have one fewer
  int kept_rows;            // of them, that stay on chip, at most
  int threads;              // of a block: columns * row_lanes, and some idle ones to fill the last warp
  int slice_channels;       // of a slice; the last one may have fewer
  int plane;                // P; no more than 2^30 is told, which no slice of several channels has
  int row_values;           // of a channel in one row: P, or where the slice is one channel, a vector
  int pieces;               // channels that the values of one thread's vector belong to, at most
  int warp_rows;            // rows of threads whose sums a warp merges before it leaves them, a power of two
  int merge_lanes;          // threads that together merge the partials of a channel, a power of two <= 32
  int team_lanes;           // the same for the sums of a channel's segments
  int staggered_teams;      // as many begin later, behind as many that do not
  int stagger_ns;           // by so much; 0: all begin at once
  int prefetched_rows;      // of each thread, of a team's next slice
  Team team;
  bool uses_pdl;     // kernels may start while the one before them ends
  bool one_channel;  // all values of a thread belong to one channel
  bool whole_bytes;  // rows of slices are whole bytes of a mask, in memory: no two slices share one
  bool keeps_mask;   // a mask's bits of kept rows stay on chip too: for each vector the word that has them
  bool evicts_last;  // rows that are read again are the last to leave the L2 cache

  constexpr bool single_pass() const { return team != Team::kNone; }
  constexpr bool blocks_wait() const { return team == Team::kCluster || team == Team::kGrid; }  // for each other
  constexpr int64_t blocks() const { return teams * segments; }
  constexpr int64_t segment_rows() const { return rows_of_segment; }
  // How many rows a segment has.
  constexpr int rows_of(int64_t segment) const {
    const int64_t left = rows - segment * segment_rows();
    return static_cast<int>(left < segment_rows() ? left : segment_rows());
  }
  // How many channels a slice has.
  constexpr int channels_of(int64_t slice) const {
    const int64_t left = channels - slice * slice_channels;
    return static_cast<int>(left < slice_channels ? left : slice_channels);
  }
  // How many rows of all segments do not stay on chip.
  constexpr int64_t spilled_rows() const {
    if (!single_pass()) return rows;
    const int64_t most = int64_t(row_lanes) * kept_rows, last = rows_of(segments - 1);
    const int64_t kept = segment_rows() < most ? segment_rows() : most;
    return rows - (segments - 1) * kept - (last < kept ? last : kept);
  }
  // What a row of each thread takes on chip, of so many tensors.
  constexpr int64_t kept_row_bytes(int tensors, int64_t value_bytes) const {
    return threads * (tensors * vector * value_bytes + (keeps_mask ? kMaskWordBytes : 0));
  }
  // Values of a channel in a segment.
  constexpr double values_of(int64_t segment) const { return double(rows_of(segment)) * row_values; }
  // Partial sums that a block leaves in shared memory, with gaps: from those of one vector to the next one's, from one
  // row's to the next one's, an odd number, and all.
  constexpr int pieces_stride() const { return pieces > 2 ? pieces + 1 : pieces; }
  constexpr int partials_stride() const { return columns * pieces_stride() | 1; }
  constexpr int partial_rows() const { return (row_lanes + warp_rows - 1) / warp_rows; }
  constexpr int block_partials() const { return partial_rows() * partials_stride(); }
  // Whether each block of a team merges all its blocks' sums of a slice, which saves the wait for peers' coefficients:
  // if each thread has few to ask for.
  constexpr bool every_block_merges() const { return segments == 1 || segments * slice_channels <= 4 * threads; }
  // Channels whose coefficients they share there.
  constexpr int block_coefficients() const { return one_channel ? 0 : slice_channels; }
};

// Where things lie in the shared memory of a single-pass block, in bytes: first what threads leave for each other, then
// coefficients of the slice's channels, then the block's sums of them for its team, then the tile.
struct SinglePassMemory {
  size_t coefficients;
  size_t sums;
  size_t tiles;
  size_t bytes;  // in all

  constexpr SinglePassMemory(const Plan& plan, int tensors, size_t value_bytes)
      : coefficients(0), sums(0), tiles(0), bytes(0) {
    const size_t number_bytes = value_bytes == 8 ? 8 : 4;  // of a coefficient
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

// What a team of a grid has in global memory, in bytes: its blocks' sums of a slice's channels,
// (slice_channels, segments), twice, for even and odd slices, and the channels' coefficients.
struct TeamWorkspace {
  size_t sums;  // of one slice
  size_t coefficients;
  size_t bytes;  // of one team

  constexpr explicit TeamWorkspace(const Plan& plan)
      : sums(plan.slice_channels * plan.segments * 2 * sizeof(double)), coefficients(2 * sums), bytes(0) {
    bytes = (coefficients + plan.slice_channels * 3 * sizeof(double) + 127) / 128 * 128;
  }
};

constexpr size_t workspace_of_teams(const Plan& plan) {
  return plan.team == Team::kGrid ? plan.teams * TeamWorkspace(plan).bytes : 0;
}

// How many blocks of a team have come to wait for each other, in all, and how many have left: a cache line per team.
struct alignas(128) TeamCounters {
  unsigned arrivals;
  unsigned leavers;
};

constexpr size_t counter_bytes(const Plan& plan) {
  return plan.team == Team::kGrid ? plan.teams * sizeof(TeamCounters) : 0;
}

// Device memory of a pass while it runs, aligned to 16 bytes, the counters to 128.
struct Workspace {
  void* memory;            // its contents do not matter
  TeamCounters* counters;  // zeros, which the pass leaves at zero: passes that run in turn may share them
};

// Threads of a warp that together merge so many partials: a power of two, one each as far as they go round.
int merge_lanes(int64_t partials);
// Blocks of kMaxThreads that make up `groups` groups of `lanes` threads.
int64_t blocks_of_groups(int64_t groups, int lanes);

// What make_plan goes by. The least values make the most of every shape.
struct Request {
  Shape shape;
  int value_bytes;
  int alignment;            // bytes, a power of two that divides every activation's address
  bool for_mask;            // rows of slices shall be whole bytes, if possible
  int single_pass_tiles;    // tensors that a team would keep of a slice; 0: there is to be none
  bool keeps_mask = false;  // besides
};

int value_bytes(DType dtype);

constexpr int kWidestAccess = 16;  // bytes, of one thread

// Of the kernels that a pass takes.
template <typename Params>
Variant variant_of(const Params& p, const Plan& plan) {
  const Variant variant = variant_of(p);
  const bool is_wide = plan.vector * value_bytes(p.dtype) == kWidestAccess;
  return variant == Variant::kRelu && !is_wide ? Variant::kReluLike : variant;
}

// Tensors that a team keeps of a slice in this pass; 0: no team could keep what is needed.
int single_pass_tiles(const ForwardParams& p);
int single_pass_tiles(const BackwardParams& p);

Plan make_plan(const Request& request, const Machine& machine);
Plan plan_forward(const ForwardParams& p, const Machine& machine);
Plan plan_backward(const BackwardParams& p, const Machine& machine);

// What is left of a backward pass without teams when its sums are there: in training dx, from dz in place of dy and z
// where that holds g to the bit.
BackwardParams after_sums(BackwardParams p);

}  // namespace bn_ext::cuda
