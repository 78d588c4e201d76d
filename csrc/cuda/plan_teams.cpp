// Chooses teams by a model of their times. Times are integer nanoseconds, so that every build makes the same choice.
//
// The model: each multiprocessor has its share of the memory bandwidth. A team reads its slice, does the fixed work of
// a slice, and writes its results. In between, memory is idle unless another team on the same multiprocessors uses it.
//
// None of the numbers is measured. They follow from arithmetic on machine code for an H200; other GPUs are treated as
// smaller ones of the same kind. A row is 4 KiB in each of 264 blocks: 1.08 MB, or 250 ns at 4.3 TB/s. The model omits
// z, masks and dz, which both paths move about equally often. It also omits the change of the split between L1 cache
// and shared memory when a kernel with teams follows one without; this takes some microseconds and may make the
// multi-kernel path faster for small tensors.
#include "plan_teams.h"

#include <algorithm>

namespace bn_ext::cuda {
namespace {

constexpr int kReservedSharedBytes = 1024;  // per block, used by the device itself

constexpr int64_t kBytesPerUs = 32'600;           // a multiprocessor's share of the bandwidth: 4.3 TB/s / 132
constexpr int64_t kMostBytesPerUs = 80'000;       // of a multiprocessor alone
constexpr int64_t kLaunch = 2'000;                // of a kernel in a stream
constexpr int64_t kCooperativeLaunch = 1'000;     // in addition: 4 rows
constexpr int64_t kOncePerSlice = 2'000;          // last sums, merges, coefficients of a block: 8 rows
constexpr int64_t kOncePerBlock = 1'000;          // on the multi-kernel path: 4 rows
constexpr int64_t kClusterWaits = 750;            // of a team that waits twice per slice: 3 rows
constexpr int64_t kGridWaits = 1'500;             // the same with counters in the L2 cache: 6 rows
constexpr int64_t kUnhidden = 4;                  // a quarter of the time that another team could hide is not hidden
constexpr int64_t kNarrowReads = 20;              // 20 reads narrower than a cache line cost as much as 21
constexpr int64_t kNarrowBytes = 128;             // per cache line
constexpr int64_t kCacheOfSecondRead = 265'000;   // bytes per multiprocessor that L2 keeps for a second kernel: 35 MB
constexpr int64_t kCacheOfSpilledRows = 189'000;  // bytes of spilled rows that it keeps: 25 MB
constexpr int64_t kMultiKernelShare = 92;  // per cent of the bandwidth that the multi-kernel path gets (last waves)
constexpr int64_t kLeastKept = 8;          // at least 1/8 of the rows must fit: less gains less than the model's error
constexpr int64_t kAlone = 16;         // a team of all blocks takes 1/16 longer: its blocks read, then wait, then write
constexpr int64_t kMostSleep = 3'000;  // enough for half a read of the largest tile

int64_t resident_blocks(const Machine& machine) { return int64_t(machine.multiprocessors) * kResidentAtATime; }

int64_t ns_of(int64_t bytes, int64_t bytes_per_us) { return bytes * 1000 / bytes_per_us; }

// Whether teams share multiprocessors, so that half of them can start later.
bool can_stagger(const Plan& plan, const Machine& machine) {
  return plan.teams_at_a_time > 1 && plan.teams_at_a_time * plan.segments > machine.multiprocessors;
}

// The bytes that one block reads into its tile for a slice, spilled rows included.
int64_t read_bytes(const Plan& plan, const Request& request) {
  return plan.segment_rows() * plan.columns * plan.vector * request.value_bytes * request.single_pass_tiles;
}

int64_t time_of_three_kernels(const Plan& plan, const Request& request, const Machine& machine) {
  const int64_t at_a_time = int64_t(machine.multiprocessors) * (kBlocksAtATime * kMaxThreads / plan.threads);
  const int64_t later_waves = ceil_div(plan.blocks(), at_a_time) - 1;
  const int64_t share = request.shape.numel() * request.value_bytes / machine.multiprocessors;
  const int64_t read = share * request.single_pass_tiles, again = std::max<int64_t>(0, read - kCacheOfSecondRead);
  return 3 * kLaunch + 2 * later_waves * kOncePerBlock +
         ns_of((read + again + share) * 100 / kMultiKernelShare, kBytesPerUs);
}

// The time of a block's fixed work per slice, with its waits.
int64_t gap_of(const Plan& plan) {
  if (plan.team == Team::kBlock) return kOncePerSlice;
  const int64_t waits = plan.team == Team::kCluster ? kClusterWaits : kGridWaits;
  return kOncePerSlice + waits / (plan.every_block_merges() ? 2 : 1);
}

int64_t time_of_teams(const Plan& plan, const Request& request, const Machine& machine) {
  const int64_t tiles = request.single_pass_tiles, multiprocessors = machine.multiprocessors;
  const int64_t teams = plan.teams_at_a_time, rounds = ceil_div(plan.slices, teams);
  const int64_t row_bytes = int64_t(plan.columns) * plan.vector * request.value_bytes;

  // Bytes that all teams move, per multiprocessor. L2 serves the second read of the spilled rows that it can hold.
  const int64_t share = request.shape.numel() * request.value_bytes / multiprocessors;
  const int64_t spilled = plan.spilled_rows() * row_bytes * tiles * teams / multiprocessors;
  const int64_t again = std::max<int64_t>(0, spilled - kCacheOfSpilledRows) * plan.slices / teams;
  int64_t moved = share * (tiles + 1) + again;
  if (row_bytes < kNarrowBytes) moved += (share * tiles + again) / kNarrowReads;

  // The time of one team for its consecutive slices, with its share of the bandwidth.
  const bool apart = plan.stagger_ns > 0;
  const int64_t used = std::min(multiprocessors, teams * plan.segments);
  const int64_t rate = std::min(kMostBytesPerUs, kBytesPerUs * multiprocessors / used);
  const int64_t in_step = apart ? plan.segments : teams * plan.segments;
  const int64_t own =
      ns_of(moved * multiprocessors / (plan.slices * plan.segments), rate) * ceil_div(in_step, multiprocessors);
  const int64_t gap = gap_of(plan);
  const int64_t read_ahead = ns_of(read_bytes(plan, request), rate) * plan.prefetched_rows / plan.rows_per_thread;
  const int64_t hidden = (rounds - 1) * std::min(gap, read_ahead);
  int64_t in_turn = rounds * (own + gap) + plan.stagger_ns - (apart ? 0 : hidden);
  if (teams == 1 && plan.segments > multiprocessors) in_turn += in_turn / kAlone;

  const int64_t start = kLaunch + (plan.team == Team::kGrid ? kCooperativeLaunch : 0);
  return start + std::max(ns_of(moved, kBytesPerUs) + (apart ? rounds * gap / kUnhidden : 0), in_turn);
}

// Chooses stagger and prefetch, which let some teams read while others write, and the policy of spilled rows.
void choose_ahead(Plan& plan, const Request& request, const Machine& machine) {
  if (machine.staggers && can_stagger(plan, machine)) {
    plan.staggered_teams = static_cast<int>(plan.teams_at_a_time / 2);
    plan.stagger_ns = static_cast<int>(std::min(kMostSleep, ns_of(read_bytes(plan, request), kBytesPerUs)));
  }
  if (plan.teams < plan.slices)
    plan.prefetched_rows = static_cast<int>(ceil_div(plan.rows_per_thread * machine.prefetched_quarters, 4));
  plan.evicts_last = machine.evict_last && plan.spilled_rows() > 0;
}

int64_t round_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

// Returns the plan with the fastest teams of at most `most` blocks.
Plan best_of(const Plan& layout, int64_t most, const Request& request, const Machine& machine) {
  Plan best = layout;
  best.team = Team::kNone;
  const int64_t most_rows = most_kept_rows(layout, request, machine);
  if (most_rows == 0) return best;
  const auto consider = [&](Team team, int64_t segments) {
    best = faster_teams(best, with_teams(layout, team, segments, request, machine), request, machine);
  };
  const int64_t blocks = resident_blocks(machine);
  const int64_t least = std::min(ceil_div(layout.rows, most_rows * layout.row_lanes), most);

  // Only powers of two fill a GPC. Another size is considered only if the rows do not divide into one of these.
  int64_t most_of_cluster = 1;
  while (2 * most_of_cluster <= std::min<int64_t>(kMaxClusterBlocks, most)) most_of_cluster *= 2;
  for (int64_t size = 1; size <= most_of_cluster; size *= 2) {
    if (size >= std::min(least, most)) consider(Team::kCluster, size);
  }
  if (!best.single_pass() && least <= kMaxClusterBlocks) consider(Team::kCluster, least);

  consider(Team::kGrid, least);
  const int64_t of_merging = 4 * layout.threads / layout.slice_channels;  // the limit of every_block_merges
  if (of_merging > least && of_merging < most) consider(Team::kGrid, of_merging);
  const int64_t least_rounds = ceil_div(layout.slices, std::max<int64_t>(1, blocks / least));
  for (int64_t rounds = least_rounds; rounds < least_rounds + kMostWaves; ++rounds) {
    consider(Team::kGrid, std::clamp(blocks / ceil_div(layout.slices, rounds), least, most));
  }
  return best;
}

}  // namespace

int64_t most_kept_rows(const Plan& layout, const Request& request, const Machine& machine) {
  Plan none = layout;
  none.kept_rows = 0;
  const int64_t room = machine.shared_bytes / kResidentAtATime - kReservedSharedBytes;
  const int64_t row_bytes = layout.kept_row_bytes(request.single_pass_tiles, request.value_bytes);
  const SinglePassMemory without(none, request.single_pass_tiles, request.value_bytes);
  return std::clamp<int64_t>((room - static_cast<int64_t>(without.bytes)) / row_bytes, 0, kMaxRowsPerThread);
}

Plan with_teams(Plan plan, Team team, int64_t segments, const Request& request, const Machine& machine) {
  const int64_t most_kept = most_kept_rows(plan, request, machine), most_segments = resident_blocks(machine);
  plan.team = Team::kNone;
  if (most_kept == 0) return plan;
  // With one column, adjacent rows are adjacent in memory: segments are whole bytes of a mask and whole cache lines.
  const int64_t unit = plan.columns == 1 ? 8 : 1;
  const int64_t least_rows = team == Team::kGrid ? std::min<int64_t>(kMinRowsPerThread, most_kept) : 1;
  const int64_t least = least_rows * plan.row_lanes;
  const int64_t segment_rows = round_up(std::max(ceil_div(plan.rows, segments), std::min(least, plan.rows)), unit);
  const int64_t rows_per_thread = ceil_div(segment_rows, plan.row_lanes);
  if (rows_per_thread > kMaxRowsPerThread) return plan;
  plan.rows_of_segment = segment_rows;
  plan.rows_per_thread = static_cast<int>(rows_per_thread);
  plan.kept_rows = static_cast<int>(std::min(rows_per_thread, most_kept));
  plan.segments = ceil_div(plan.rows, segment_rows);
  plan.teams = plan.slices;
  plan.teams_at_a_time = std::clamp<int64_t>(most_segments / plan.segments, 1, plan.slices);
  if (plan.segments == 1) {
    plan.team = Team::kBlock;
  } else if (plan.segments > most_segments) {
    return plan;
  } else if (team == Team::kCluster && machine.clusters && plan.segments == segments && segments <= kMaxClusterBlocks) {
    plan.team = Team::kCluster;
  } else if (team == Team::kGrid && machine.cooperative) {
    plan.team = Team::kGrid;
    plan.teams = plan.teams_at_a_time;
  }
  if (plan.kept_rows * kLeastKept < plan.rows_per_thread) plan.team = Team::kNone;
  if (plan.single_pass()) choose_ahead(plan, request, machine);
  return plan;
}

Plan best_teams(const Plan& layout, const Request& request, const Machine& machine) {
  const int64_t blocks = resident_blocks(machine);
  const bool halves = layout.image_rows == 1 && machine.half_chip != HalfChip::kNever;
  if (!halves) return best_of(layout, blocks, request, machine);
  const Plan half = best_of(layout, blocks / 2, request, machine);
  if (machine.half_chip == HalfChip::kAlways) return half;
  return faster_teams(half, best_of(layout, blocks, request, machine), request, machine);
}

Plan faster_teams(const Plan& a, const Plan& b, const Request& request, const Machine& machine) {
  if (!a.single_pass() || !b.single_pass()) return a.single_pass() ? a : b;
  return time_of(b, request, machine) < time_of(a, request, machine) ? b : a;
}

int64_t time_of(const Plan& plan, const Request& request, const Machine& machine) {
  return plan.single_pass() ? time_of_teams(plan, request, machine) : time_of_three_kernels(plan, request, machine);
}

}  // namespace bn_ext::cuda
