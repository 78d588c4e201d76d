// The forward pass's last step: y of rows, and the bits of its mask.
#pragma once

#include "activation.cuh"
#include "mask.cuh"

namespace bn_ext::cuda {

// A thread's part in y = activation((x - mean) * scale + offset + z).
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
class Apply {
 public:
  using A = acc_t<T>;
  using V = Vector<T, kVector>;

  struct Row {
    int64_t offset;
    V x;
    V z;
  };

  Affine<A> affine[kOneChannel ? 1 : kVector] = {};

  explicit __device__ Apply(const ForwardParams& p)
      : p_(p),
        has_z_(kVariant != Variant::kPlain && p.z != nullptr),
        has_mask_(kVariant == Variant::kReluLike && p.mask != nullptr) {}

  __device__ V z(int64_t offset) const {
    return has_z_ ? load_last<kVector>(static_cast<const T*>(p_.z) + offset) : V{};
  }

  __device__ void finish(const Plan& plan, const Row& row) const {
    V y;
    unsigned passed = 0;
    with_activation<kVariant, A>(p_.activation, [&](const auto& formula) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        A u = affine[kOneChannel ? 0 : i](row.x[i]);
        if (has_z_) u += row.z[i];
        if constexpr (kVariant == Variant::kReluLike) passed |= unsigned{!formula.blocked(u)} << i;
        y.set(i, formula.value(u));
      }
    });
    store_last(static_cast<T*>(p_.y) + row.offset, y);
    if (has_mask_) store_bits<kVector>(plan, p_.mask, row.offset, passed);
  }

 private:
  const ForwardParams& p_;  // not copies of its pointers, which would take registers
  bool has_z_;
  bool has_mask_;
};

}  // namespace bn_ext::cuda
