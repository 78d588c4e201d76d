// The planner: computes a Plan from a shape, the size of a type and the machine, by arithmetic only.
#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>

#include "plan_teams.h"

namespace bn_ext::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kByteBits = 8;
constexpr int kLine = 128;   // bytes of a cache line, the least width of a slice, so that few channels share a block
constexpr int kSector = 32;  // bytes, the smallest unit that memory moves
constexpr int64_t kWidePlane = 512;       // bytes: a warp's 16-byte accesses, so that the end of a plane costs little
constexpr int64_t kRowsOfBlock = 4;       // the fixed cost of a block, in rows that a thread reads; not measured
constexpr int64_t kKeptResult = 150'000;  // bytes of a result per multiprocessor that L2 keeps: 20 of 50 MB on an H200
constexpr int64_t kManyRows = int64_t(1) << 30;

// The fewest channels whose values in an image fill whole units, or 0 if that takes more vectors than threads.
int64_t adjacent_channels(int64_t plane, int unit, int vector) {
  const int64_t channels = unit / std::gcd<int64_t>(plane, unit);
  return channels * plane / vector <= kMaxThreads ? channels : 0;
}

void choose_wide_planes(Plan& plan, int64_t images, int64_t plane) {
  plan.slice_channels = 1;
  plan.slice_width = plane;
  plan.slices = plan.channels;
  plan.columns = 1;
  plan.image_rows = plane / plan.vector;
  plan.rows = images * plan.image_rows;
  plan.row_lanes = static_cast<int>(std::min<int64_t>(kMaxThreads, ceil_div(plan.rows, kWarp) * kWarp));
  plan.row_values = plan.vector;
  plan.one_channel = true;
}

void choose_narrow_planes(
    Plan& plan, int64_t images, int64_t plane, int64_t least_channels, int line, int value_bytes) {
  // All slices have nearly the same width. They are wider if there are few rows, and if rows begin in the middle of a
  // sector, so that few sectors belong to two slices.
  const bool starts_at_sectors = plan.pitch * value_bytes % kSector == 0;
  const int64_t columns_of_line = std::max<int64_t>(1, line / (plan.vector * value_bytes));
  const int64_t columns =
      std::clamp<int64_t>(kMaxThreads / images, starts_at_sectors ? columns_of_line : kMaxThreads, kMaxThreads);
  const int64_t least_columns = least_channels * plane / plan.vector;
  const int64_t units = ceil_div(plan.channels, least_channels);
  const int64_t most_units = std::max<int64_t>(1, columns / least_columns);
  const int64_t units_per_slice = ceil_div(units, ceil_div(units, most_units));
  plan.slices = ceil_div(units, units_per_slice);
  plan.slice_channels = static_cast<int>(units_per_slice * least_channels);
  plan.slice_width = plan.slice_channels * plane;
  plan.columns = static_cast<int>(plan.slice_width / plan.vector);
  plan.image_rows = 1;
  plan.rows = images;
  plan.row_lanes = static_cast<int>(std::min<int64_t>(kMaxThreads / plan.columns, images));
  plan.row_values = static_cast<int>(plane);
  plan.one_channel = plan.vector == 1;
}

void choose_vector(Plan& plan, int64_t images, int64_t plane, int line, const Request& request) {
  const int value_bytes = request.value_bytes;
  for (int access = kWidestAccess; access >= value_bytes; access /= 2) {
    plan.vector = access / value_bytes;
    if (request.alignment % access != 0 || plan.pitch % plan.vector != 0) continue;
    int unit = request.for_mask && plan.pitch % kByteBits == 0 ? kByteBits : plan.vector;
    if (adjacent_channels(plane, unit, plan.vector) == 0) unit = plan.vector;
    const int64_t channels = adjacent_channels(plane, unit, plan.vector);
    if (channels > 0 && (plane * value_bytes < kWidePlane || plane % unit != 0)) {
      return choose_narrow_planes(plan, images, plane, channels, line, value_bytes);
    }
    if (plane % plan.vector == 0) return choose_wide_planes(plan, images, plane);
  }
}

// The GPU runs `at_a_time` blocks at once, and the last wave takes as long as a full one. Chooses, among some numbers
// of waves, the one that takes the least time, measured in rows.
void choose_segments(Plan& plan, const Machine& machine) {
  const int64_t at_a_time = int64_t(machine.multiprocessors) * (kBlocksAtATime * kMaxThreads / plan.threads);
  int64_t least_time = INT64_MAX;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t segments = std::max<int64_t>(1, waves * at_a_time / plan.slices);
    const int64_t rows_per_thread = std::clamp<int64_t>(
        ceil_div(ceil_div(plan.rows, segments), plan.row_lanes), kMinRowsPerThread, kMaxRowsPerThread);
    const int64_t blocks = plan.slices * ceil_div(plan.rows, rows_per_thread * plan.row_lanes);
    const int64_t time = ceil_div(blocks, at_a_time) * (rows_per_thread + kRowsOfBlock);
    if (time >= least_time) continue;
    least_time = time;
    plan.rows_per_thread = static_cast<int>(rows_per_thread);
  }
  plan.rows_of_segment = int64_t(plan.row_lanes) * plan.rows_per_thread;
  plan.segments = ceil_div(plan.rows, plan.segment_rows());
  plan.teams = plan.teams_at_a_time = plan.slices;
}

int common_alignment(Variant variant, int value_bytes, std::initializer_list<const void*> addresses) {
  const bool any = variant == Variant::kAny;
  uintptr_t bits = any ? std::min(kWidestAccess, most_values_of_any(value_bytes) * value_bytes) : kWidestAccess;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & -bits);
}

// Chooses how the threads of a block merge their sums into sums of channels.
void choose_partials(Plan& plan) {
  const int values = plan.row_values;
  plan.pieces = plan.one_channel ? 1 : values == 1 ? plan.vector : (plan.vector + values - 2) / values + 1;
  // A warp merges rows of threads only if no two sums of a thread belong to the same channel.
  plan.warp_rows = kWarp % plan.columns == 0 && (plan.one_channel || values == 1) ? kWarp / plan.columns : 1;
}

// Chooses the threads that merge a channel's sums, so few that all channels are merged at the same time.
void choose_lanes(Plan& plan) {
  const auto lanes_of = [&](int64_t channels, int64_t parts) {
    int lanes = merge_lanes(parts);
    while (lanes > 1 && lanes * channels > plan.threads) lanes /= 2;
    return lanes;
  };
  plan.merge_lanes = lanes_of(plan.slice_channels, plan.partial_rows() * ceil_div(plan.row_values, plan.vector));
  const int64_t merging_blocks = plan.every_block_merges() ? 1 : plan.segments;
  plan.team_lanes = lanes_of(ceil_div(plan.slice_channels, merging_blocks), plan.segments);
}

// Whether dz, which is rounded to the type of the activation tensors, equals g to the bit.
bool dz_is_exact(const BackwardParams& p) {
  return value_bytes(p.dtype) >= 4 || (p.activation.kind == ActivationKind::kReluLike && p.activation.alpha == 0);
}

}  // namespace

int value_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

int single_pass_tiles(const ForwardParams& p) {
  // The mean over all batches (momentum=None) needs the count that one block of the same kernel would increment.
  const bool reads_count = p.cumulative && p.num_batches_tracked != nullptr;
  return p.training && !p.recompute && !reads_count ? 1 : 0;
}

int single_pass_tiles(const BackwardParams& p) {
  const bool reads_z = p.z != nullptr && p.mask == nullptr;
  return p.training && p.needs_sums() && !p.dy_is_scalar && !reads_z ? 2 : 0;
}

Plan plan_with_slices(const Request& request, int line, const Machine& machine) {
  const Shape& shape = request.shape;
  const int64_t plane = shape.channels_last ? 1 : shape.s;
  const int64_t images = shape.channels_last ? shape.n * shape.s : shape.n;
  Plan plan{};
  plan.keeps_mask = request.keeps_mask;
  plan.channels = shape.c;
  plan.pitch = shape.c * plane;
  plan.plane = static_cast<int>(std::min(plane, kManyRows));
  choose_vector(plan, images, plane, line, request);
  plan.whole_bytes = plan.pitch % kByteBits == 0 && plan.slice_width % kByteBits == 0;
  plan.threads = static_cast<int>(ceil_div(plan.columns * plan.row_lanes, kWarp)) * kWarp;
  plan.step_rows = static_cast<int>(plan.row_lanes % plan.image_rows);
  plan.step_offset = plan.row_lanes / plan.image_rows * plan.pitch + int64_t(plan.step_rows) * plan.vector;
  plan.wrap_offset = plan.pitch - plan.image_rows * plan.vector;
  plan.uses_pdl = machine.pdl;
  choose_partials(plan);
  choose_segments(plan, machine);
  return plan;
}

Plan make_plan(const Request& request, const Machine& machine) {
  const Plan multi_kernel = plan_with_slices(request, kLine, machine);
  Plan best = multi_kernel;
  if (request.single_pass_tiles > 0) {
    best = best_teams(multi_kernel, request, machine);
    const Plan narrower = plan_with_slices(request, kLine / 2, machine);
    const bool may_be_narrower = machine.half_chip != HalfChip::kNever || best.spilled_rows() > 0;
    if (narrower.slice_width < multi_kernel.slice_width && may_be_narrower) {
      const Plan other = best_teams(narrower, request, machine);
      // The model is least certain about second reads from the L2 cache, so a slice width without spilled rows is
      // preferred to one with them. Otherwise the time decides.
      const bool spills = best.spilled_rows() > 0, other_spills = other.spilled_rows() > 0;
      if (spills == other_spills || !best.single_pass() || !other.single_pass()) {
        best = faster_teams(best, other, request, machine);
      } else if (spills) {
        best = other;
      }
    }
    const auto time = [&](const Plan& plan) { return time_of(plan, request, machine); };
    if (!best.single_pass() || (machine.three_kernels && time(multi_kernel) < time(best))) best = multi_kernel;
  }
  choose_lanes(best);
  const int64_t result_bytes = request.shape.numel() * request.value_bytes;
  const bool keeps = machine.keep_results && result_bytes <= kKeptResult * machine.multiprocessors;
  best.result_policy = keeps ? kEvictNormal : kEvictFirst;
  return best;
}

Plan plan_forward(const ForwardParams& p, const Machine& machine) {
  const int bytes = value_bytes(p.dtype);
  const int alignment = common_alignment(variant_of(p), bytes, {p.x, p.z, p.y});
  // The same plan with and without a mask, so that results do not depend on it.
  const bool for_mask = p.activation.kind == ActivationKind::kReluLike && p.z != nullptr;
  return make_plan({p.shape, bytes, alignment, for_mask, single_pass_tiles(p)}, machine);
}

Plan plan_backward(const BackwardParams& p, const Machine& machine) {
  const int bytes = value_bytes(p.dtype);
  const void* dy = p.dy_is_scalar ? nullptr : p.dy;
  const int alignment = common_alignment(variant_of(p), bytes, {dy, p.x, p.z, p.dx, p.dz});
  Plan plan = make_plan({p.shape, bytes, alignment, false, single_pass_tiles(p), p.mask != nullptr}, machine);
  plan.evicts_last &= p.dx != nullptr || p.dz != nullptr;  // otherwise nothing is read twice
  return plan;
}

BackwardParams after_sums(BackwardParams p) {
  if (p.dz != nullptr && !p.dy_is_scalar && dz_is_exact(p)) {
    p.dy = p.dz;
    p.activation.kind = ActivationKind::kNone;
    p.z = nullptr;
    p.mask = nullptr;
  }
  p.dz = nullptr;
  if (!p.training) p.dx = nullptr;
  return p;
}

int merge_lanes(int64_t partials) {
  int lanes = 1;
  while (lanes < std::min<int64_t>(kWarp, partials)) lanes *= 2;
  return lanes;
}

int64_t blocks_of_groups(int64_t groups, int lanes) { return ceil_div(groups * lanes, kMaxThreads); }

}  // namespace bn_ext::cuda
