// The last step of the forward pass: computes y and the bits of its mask, row by row.
#pragma once

#include "activation.cuh"
#include "mask.cuh"

namespace bn_ext::cuda {

// The bytes of each tensor that a thread has in flight: as many as registers allow. Single-pass kernels have more of
// them.
constexpr int bytes_of_apply(Variant variant, int access, bool holds_slices = false) {
  if (variant == Variant::kReluLike && holds_slices) return 64;
  if (variant == Variant::kAny && holds_slices) return 16;
  return variant > Variant::kRelu ? 32 : access == kWidestAccess ? 128 : 64;
}

// Computes y = activation((x - mean) * scale + offset + z) for the rows of a thread.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
class Apply {
 public:
  using A = acc_t<T>;
  using V = Vector<T, kVector>;

  struct Row {
    uint64_t at;
    V x;
    V z;
  };

  Affine<A> affine[kOneChannel ? 1 : kVector] = {};

  explicit __device__ Apply(const ForwardParams& p)
      : p_(p),
        has_z_(kVariant > Variant::kRelu && p.z != nullptr),
        has_mask_(kVariant == Variant::kReluLike && p.mask != nullptr) {}

  // The current row of a walk: x is given, z is loaded.
  template <typename Walk>
  __device__ Row row(const Walk& walk, const V& x) const {
    return {walk.at, x, has_z_ ? load_last<kVector>(walk.in(p_.z, walk.at)) : V{}};
  }

  template <typename Walk>
  __device__ void finish(const Plan& plan, const Walk& walk, const Row& row) const {
    A y[kVector];
    unsigned passed = 0;
    with_activation<kVariant, A>(p_.activation, [&](const auto& formula) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        A u = affine[kOneChannel ? 0 : i](row.x[i]);
        if (has_z_) u += row.z[i];
        if constexpr (kVariant == Variant::kReluLike) passed |= unsigned{!formula.blocked(u)} << i;
        if constexpr (kVariant == Variant::kRelu) {
          y[i] = u;
        } else {
          y[i] = formula.value(u);
        }
      }
    });
    store_result(walk.in(p_.y, row.at), V::template rounded<kVariant == Variant::kRelu>(y), plan.result_policy);
    if (has_mask_) store_bits<kVector>(plan, p_.mask, walk.offset(row.at), passed);
  }

 private:
  const ForwardParams& p_;  // a reference: copies of its pointers would take registers
  bool has_z_;
  bool has_mask_;
};

}  // namespace bn_ext::cuda
