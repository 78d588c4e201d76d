// Which teams keep slices on chip, and how they come out of step.
#include "plan_teams.h"

#include <algorithm>

namespace bn_ext::cuda {
namespace {

// Times of an H200, from a model of the machine code; not measured.
constexpr int64_t kBytesPerNs = 33;             // a multiprocessor's share of its memory's 4.3 TB/s
constexpr int64_t kMostBytesOfBlockPerNs = 40;  // of a block, if few run
constexpr int64_t kTeamNs = 2000;               // what a block does between reading and writing a slice
constexpr int64_t kClusterNs = 500;             // each wait of a cluster's blocks
constexpr int64_t kGridNs = 1000;               // each wait of a grid's team
constexpr int64_t kGridsStartNs = 1000;         // what a cooperative launch takes more
constexpr int64_t kBlocksOfGpc = 32;            // resident ones, on 16 multiprocessors
constexpr int64_t kLeastKept = 8;               // a part of so many must fit, for the general path has no barriers
constexpr int kReservedSharedBytes = 1024;      // of every block, for the device's own use
constexpr int64_t kBlockBytesPerNs = 16;        // a block's share of an H200's memory; calculated, not measured
constexpr int64_t kMostStaggerNs = 3000;

// Of blocks that hold slices, those that the machine has at a time.
int64_t resident_blocks(const Machine& machine) { return int64_t(machine.multiprocessors) * kResidentAtATime; }

// Teams of `segments` blocks or a few less, whose threads keep so many rows; kNone where the machine has no such teams.
Plan with_teams(Plan plan, int64_t segments, int64_t most_kept, const Machine& machine) {
  const int64_t least_rows =
      std::min(std::min<int64_t>(kMinRowsPerThread, most_kept), ceil_div(plan.rows, plan.row_lanes));
  const int64_t rows_per_thread = std::max(least_rows, ceil_div(plan.rows, segments * plan.row_lanes));
  plan.team = Team::kNone;
  if (rows_per_thread > kMaxRowsPerThread) return plan;
  plan.rows_per_thread = static_cast<int>(rows_per_thread);
  plan.kept_rows = static_cast<int>(std::min(rows_per_thread, most_kept));
  plan.segments = ceil_div(plan.rows, plan.segment_rows());
  plan.teams = plan.slices;
  const int64_t most_segments = resident_blocks(machine);
  if (plan.segments == 1) {
    plan.team = Team::kBlock;
  } else if (plan.segments <= std::min<int64_t>(kMaxClusterBlocks, most_segments) && machine.clusters) {
    plan.team = Team::kCluster;
  } else if (plan.segments <= most_segments && machine.cooperative) {
    plan.team = Team::kGrid;
    plan.teams = std::min(plan.slices, most_segments / plan.segments);
  }
  return plan;
}

// Teams that run at a time. The blocks of a cluster are in one GPC: clusters of 3, 5, 6 or 7 leave some of its places
// empty.
int64_t teams_at_a_time(const Plan& plan, const Machine& machine) {
  const int64_t blocks = resident_blocks(machine);
  const int64_t fitting = blocks / plan.segments;
  if (plan.team != Team::kCluster) return std::max<int64_t>(1, fitting);
  return std::max<int64_t>(1, std::min(fitting, ceil_div(blocks, kBlocksOfGpc) * (kBlocksOfGpc / plan.segments)));
}

// In how many nanoseconds so many blocks at a time move bytes of each.
int64_t time_to_move(int64_t bytes, int64_t blocks, const Machine& machine) {
  const int64_t of_memory = bytes * blocks / (machine.multiprocessors * kBytesPerNs);
  return std::max(of_memory, bytes / kMostBytesOfBlockPerNs);
}

// In how many nanoseconds teams are done that keep so many tensors and write one.
int64_t time_of(const Plan& plan, int tensors, int value_bytes, const Machine& machine) {
  const int64_t teams = std::min(plan.slices, teams_at_a_time(plan, machine));
  const int64_t rows = (tensors + 1) * plan.rows_per_thread + tensors * (plan.rows_per_thread - plan.kept_rows);
  const int64_t moving = time_to_move(rows * plan.threads * plan.vector * value_bytes, teams * plan.segments, machine);
  const int64_t waits = plan.every_block_merges() ? 1 : 2;
  const int64_t waiting = plan.team == Team::kBlock ? 0 : waits * (plan.team == Team::kCluster ? kClusterNs : kGridNs);
  return ceil_div(plan.slices, teams) * (moving + kTeamNs + waiting) + (plan.team == Team::kGrid ? kGridsStartNs : 0);
}

}  // namespace

Plan choose_team(const Plan& general, int tensors, int value_bytes, const Machine& machine) {
  Plan none = general;
  none.kept_rows = 0;
  const int64_t room = machine.shared_bytes / kResidentAtATime - kReservedSharedBytes;
  const int64_t row_bytes = general.kept_row_bytes(tensors, value_bytes);
  const int64_t free_bytes = room - static_cast<int64_t>(ResidentMemory(none, tensors, value_bytes).bytes);
  const int64_t most_rows = std::min<int64_t>(kMaxRowsPerThread, free_bytes / row_bytes);
  if (free_bytes < row_bytes) return general;

  const int64_t least = ceil_div(general.rows, most_rows * general.row_lanes), most = resident_blocks(machine);
  const auto time = [&](const Plan& plan) { return time_of(plan, tensors, value_bytes, machine); };
  Plan best = general;
  const auto consider = [&](int64_t segments) {
    const Plan plan = with_teams(general, segments, most_rows, machine);
    const bool keeps_enough = plan.kept_rows * kLeastKept >= plan.rows_per_thread;
    if (!plan.resident() || !keeps_enough || (best.resident() && time(plan) >= time(best))) return;
    best = plan;
  };
  if (least > most) {
    consider(most);
    return best;
  }
  consider(least);
  const int64_t least_rounds = ceil_div(general.slices * least, most);
  for (int64_t rounds = least_rounds; rounds < least_rounds + kMostWaves; ++rounds) {
    const int64_t segments = most / ceil_div(general.slices, rounds);
    consider(std::max(least, segments));
    consider(std::max(least, std::min<int64_t>(segments, kMaxClusterBlocks)));
  }
  return best;
}

void choose_overlap(Plan& plan, const Request& request, const Machine& machine) {
  if (!plan.resident()) return;
  const int64_t teams = resident_blocks(machine) / plan.segments;
  if (machine.staggers && teams > 1 && plan.blocks() > machine.multiprocessors) {
    // Half of the time in which a block reads what it keeps.
    const int64_t bytes = plan.kept_rows * plan.kept_row_bytes(request.resident_tiles, request.value_bytes);
    plan.staggered_teams = static_cast<int>(teams / 2);
    plan.stagger_ns = static_cast<int>(std::min<int64_t>(kMostStaggerNs, bytes / kBlockBytesPerNs / 2));
  }
  if (plan.teams < plan.slices)
    plan.prefetched_rows = static_cast<int>(ceil_div(plan.rows_per_thread * machine.prefetched_quarters, 4));
}

}  // namespace bn_ext::cuda
