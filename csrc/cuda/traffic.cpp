// Counts the tensors and masks that the kernels of a pass read and write, as forward.cuh, backward.cuh, gradient.cuh,
// single_pass_forward.cuh and single_pass_backward.cuh do it. tests/cuda_on_cpu compares the bytes with those that the
// kernels move.
#include "traffic.h"

namespace bn_ext::cuda {
namespace {

// How often a whole tensor or mask is moved.
struct Counts {
  int read;           // tensors
  int read_again;     // tensors: only their spilled rows
  int written;        // tensors
  int masks_read;     // masks
  int masks_again;    // masks: only the bits of spilled rows
  int masks_written;  // masks
  int launches;
};

Traffic in_bytes(const Counts& counts, const Shape& shape, DType dtype, const Plan& plan) {
  const int64_t tensor = shape.numel() * value_bytes(dtype), mask = (shape.numel() + 7) / 8;
  const int64_t spilled = plan.single_pass() ? shape.numel() / plan.rows * plan.spilled_rows() : 0;  // values
  Traffic traffic{};
  traffic.mask_read = counts.masks_read * mask + counts.masks_again * ((spilled + 7) / 8);
  traffic.mask_written = counts.masks_written * mask;
  traffic.read = counts.read * tensor + counts.read_again * spilled * value_bytes(dtype) + traffic.mask_read;
  traffic.written = counts.written * tensor + traffic.mask_written;
  traffic.launches = counts.launches;
  return traffic;
}

bool reads_mask(const BackwardParams& p) { return p.mask != nullptr && variant_of(p) == Variant::kReluLike; }

// Adds one read of the inputs of Gradient. `wants_x`: x is needed for more than u.
void add_gradient(Counts& counts, const BackwardParams& p, bool wants_x) {
  const bool reads_z = p.z != nullptr && p.mask == nullptr;
  counts.read += !p.dy_is_scalar + (wants_x || p.needs_u()) + reads_z;
  counts.masks_read += reads_mask(p);
}

Counts single_pass_backward(const BackwardParams& p) {
  const int results = (p.dx != nullptr) + (p.dz != nullptr);
  Counts counts{};
  counts.launches = 1;
  counts.read = 2;
  counts.read_again = results > 0 ? 2 : 0;
  counts.written = results;
  counts.masks_read = reads_mask(p);
  counts.masks_again = reads_mask(p) && results > 0;
  return counts;
}

Counts multi_kernel_backward(const BackwardParams& p) {
  Counts counts{};
  BackwardParams left = p;
  if (p.needs_sums()) {
    const bool writes_dx = p.dx != nullptr && !p.training;
    counts.launches += 2;
    add_gradient(counts, p, p.dweight != nullptr || (p.training && p.dx != nullptr));
    counts.written += writes_dx + (p.dz != nullptr);
    left = after_sums(p);
  }
  if (left.dx == nullptr && left.dz == nullptr) return counts;
  counts.launches += 1;
  add_gradient(counts, left, left.training && left.dx != nullptr);
  counts.written += (left.dx != nullptr) + (left.dz != nullptr);
  return counts;
}

}  // namespace

Traffic expected_traffic(const ForwardParams& p, const Plan& plan) {
  const bool has_sums = p.training && !p.recompute;
  Counts counts{};
  counts.launches = has_sums && !plan.single_pass() ? 3 : 1;
  counts.read = 1 + (p.z != nullptr);
  if (has_sums) (plan.single_pass() ? counts.read_again : counts.read) += 1;
  counts.written = 1;
  if (p.mask != nullptr && !p.recompute) {
    // If slices share bytes of the mask, it is cleared first and then changed in place.
    counts.masks_read = plan.whole_bytes ? 0 : 1;
    counts.masks_written = plan.whole_bytes ? 1 : 2;
  }
  return in_bytes(counts, p.shape, p.dtype, plan);
}

Traffic expected_traffic(const BackwardParams& p, const Plan& plan) {
  return in_bytes(plan.single_pass() ? single_pass_backward(p) : multi_kernel_backward(p), p.shape, p.dtype, plan);
}

}  // namespace bn_ext::cuda
