// The planner: from a shape, a type's size and the machine to a Plan. Pure arithmetic.
#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>

namespace bn_ext::cuda {
namespace {

constexpr int kWidestAccess = 16;  // bytes, of one thread
constexpr int kWarp = 32;
constexpr int kByteBits = 8;
constexpr int kLine = 128;            // bytes of a cache line: slices no narrower, so that few channels share a block
constexpr int kSector = 32;           // bytes: the least that memory moves
constexpr int64_t kWidePlane = 512;   // bytes: a warp's 16-byte accesses, so that a plane's end costs little
constexpr int kMinRowsPerThread = 4;  // what a thread reads at once
constexpr int64_t kMostWaves = 4;
constexpr int64_t kRowsOfBlock = 4;  // in what time a thread reads them, a block does what it does once; not measured
constexpr int kReservedSharedBytes = 1024;  // of every block, for the device's own use
constexpr int64_t kManyRows = int64_t(1) << 30;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The fewest channels whose values fill whole units of vectors, if they fit side by side into a block; else 0.
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
  plan.partials_per_row = 1;
  plan.partial_values = plan.vector;
  plan.one_channel = true;
}

void choose_narrow_planes(Plan& plan, int64_t images, int64_t plane, int64_t least_channels, int value_bytes) {
  // Slices of nearly the same width, and wider ones where there are few rows, and where rows begin in the middle of a
  // sector: so that few sectors belong to two slices, or none.
  const bool starts_at_sectors = plan.pitch * value_bytes % kSector == 0;
  const int64_t columns_of_line = kLine / (plan.vector * value_bytes);
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
  plan.partials_per_row = static_cast<int>(plane);
  plan.partial_values = 1;
  plan.one_channel = plan.vector == 1;
}

void choose_vector(Plan& plan, int64_t images, int64_t plane, int value_bytes, int alignment, bool for_mask) {
  for (int access = kWidestAccess; access >= value_bytes; access /= 2) {
    plan.vector = access / value_bytes;
    if (alignment % access != 0 || plan.pitch % plan.vector != 0) continue;
    int unit = for_mask && plan.pitch % kByteBits == 0 ? kByteBits : plan.vector;
    if (adjacent_channels(plane, unit, plan.vector) == 0) unit = plan.vector;
    const int64_t channels = adjacent_channels(plane, unit, plan.vector);
    if (channels > 0 && (plane * value_bytes < kWidePlane || plane % unit != 0)) {
      return choose_narrow_planes(plan, images, plane, channels, value_bytes);
    }
    if (plane % plan.vector == 0) return choose_wide_planes(plan, images, plane);
  }
}

// The GPU runs so many blocks at a time; the last wave takes as long as a full one. Of some numbers of waves, chooses
// the one that is done first, counting time in rows.
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
  plan.segments = ceil_div(plan.rows, plan.segment_rows());
}

// Of `tensors` in tiles, beside blocks enough to hide each other's barriers. A tile so small is read and written in
// less time than the general path's launches take, so it should pay also where there are few of them; not measured.
void choose_residence(Plan& plan, int tensors, int value_bytes, const Machine& machine) {
  Plan whole = plan;
  const int64_t rows_per_thread = ceil_div(plan.rows, plan.row_lanes);
  if (rows_per_thread > kMaxRowsPerThread) return;
  whole.rows_per_thread = static_cast<int>(rows_per_thread);
  whole.segments = 1;
  whole.resident = true;
  const int64_t room = machine.shared_bytes / kBlocksAtATime - kReservedSharedBytes;
  if (static_cast<int64_t>(ResidentMemory(whole, tensors, value_bytes).bytes) <= room) plan = whole;
}

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

int common_alignment(Variant variant, int value_bytes, std::initializer_list<const void*> addresses) {
  const bool any = variant == Variant::kAny;
  uintptr_t bits = any ? std::min(kWidestAccess, most_values_of_any(value_bytes) * value_bytes) : kWidestAccess;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & -bits);
}

}  // namespace

Plan make_plan(const Shape& shape, int value_bytes, int alignment, bool for_mask, const Machine& machine) {
  const int64_t plane = shape.channels_last ? 1 : shape.s;
  const int64_t images = shape.channels_last ? shape.n * shape.s : shape.n;
  Plan plan{};
  plan.channels = shape.c;
  plan.pitch = shape.c * plane;
  plan.plane = static_cast<int>(std::min(plane, kManyRows));
  choose_vector(plan, images, plane, value_bytes, alignment, for_mask);
  plan.whole_bytes = plan.pitch % kByteBits == 0 && plan.slice_width % kByteBits == 0;
  plan.threads = static_cast<int>(ceil_div(plan.columns * plan.row_lanes, kWarp)) * kWarp;
  choose_segments(plan, machine);

  plan.step_rows = static_cast<int>(plan.row_lanes % plan.image_rows);
  plan.step_offset = plan.row_lanes / plan.image_rows * plan.pitch + int64_t(plan.step_rows) * plan.vector;
  plan.wrap_offset = plan.pitch - plan.image_rows * plan.vector;
  // No more of them than there are threads for all channels at once.
  const int lanes_of_channel = std::max(1, plan.threads / plan.slice_channels);
  plan.merge_lanes = merge_lanes(plan.row_lanes * plan.partials_per_row);
  while (plan.merge_lanes > lanes_of_channel) plan.merge_lanes /= 2;
  return plan;
}

Plan plan_forward(const ForwardParams& p, const Machine& machine) {
  const int bytes = value_bytes(p.dtype);
  const int alignment = common_alignment(variant_of(p.activation, p.z), bytes, {p.x, p.z, p.y});
  // Alike for calls with a mask and without, so that results do not depend on it.
  const bool for_mask = p.activation.kind == ActivationKind::kReluLike && p.z != nullptr;
  Plan plan = make_plan(p.shape, bytes, alignment, for_mask, machine);
  // The mean over all batches needs their number, which one kernel raises and another one reads.
  const bool reads_count = p.cumulative && p.num_batches_tracked != nullptr;
  if (p.training && !p.repeats && !reads_count) choose_residence(plan, 1, bytes, machine);
  return plan;
}

Plan plan_backward(const BackwardParams& p, const Machine& machine) {
  const int bytes = value_bytes(p.dtype);
  const void* dy = p.dy_is_scalar ? nullptr : p.dy;
  const int alignment = common_alignment(variant_of(p.activation, p.z), bytes, {dy, p.x, p.z, p.dx, p.dz});
  Plan plan = make_plan(p.shape, bytes, alignment, false, machine);
  const bool reads_z = p.z != nullptr && p.mask == nullptr;
  if (p.training && p.needs_sums() && !p.dy_is_scalar && !reads_z) choose_residence(plan, 2, bytes, machine);
  return plan;
}

int merge_lanes(int64_t partials) {
  int lanes = 1;
  while (lanes < std::min<int64_t>(kWarp, partials)) lanes *= 2;
  return lanes;
}

int64_t blocks_of_groups(int64_t groups, int lanes) { return ceil_div(groups * lanes, kMaxThreads); }

}  // namespace bn_ext::cuda
