// The inputs of the backward kernels, g = dy * activation'(u + z), and the results that follow from the sums of g.
#pragma once

#include "activation.cuh"
#include "mask.cuh"
#include "merge.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Loads the rows of a thread and computes g. kLast: no later kernel of this pass reads them. With a mask, g needs
// neither x nor z. dy may be one value for all.
template <typename T, int kVector, Variant kVariant, bool kLast>
class Gradient {
 public:
  using A = acc_t<T>;
  using V = Vector<T, kVector>;

  struct Row {
    uint64_t at;
    V dy;
    V x;  // zeros if not read
    V z;
    unsigned passed;  // bits
  };

  // `wants_x`: x is needed for more than u. A caller that knows at compile time whether there is a mask and whether z
  // is read uses the second constructor, which saves a third of the instructions of kReluLike.
  __device__ Gradient(const BackwardParams& p, bool wants_x)
      : Gradient(p, wants_x, p.mask != nullptr, p.z != nullptr && p.mask == nullptr) {}
  __device__ Gradient(const BackwardParams& p, bool wants_x, bool has_mask, bool reads_z)
      : p_(p),
        reads_x_(wants_x || (kVariant != Variant::kPlain && p.needs_u())),
        has_mask_(kVariant == Variant::kReluLike && has_mask),
        reads_z_(kVariant > Variant::kRelu && reads_z) {
    if (!p.dy_is_scalar) return;
    T values[kVector];
#pragma unroll
    for (T& value : values) value = load<1>(static_cast<const T*>(p.dy)).value(0);
    all_ = V::of(values);
  }

  // Calls finish(row) for all rows. A thread has kBytes bytes of each tensor in flight.
  template <int kBytes, typename Walk, typename Finish>
  __device__ void for_rows(const Plan& plan, Walk& walk, const Finish& finish) const {
    in_chunks<kChunkRows<V, kBytes>>(walk.rows, [&](auto count, int) {
      Row rows[decltype(count)::value] = {};
#pragma unroll
      for (Row& row : rows) {
        row.at = walk.at;
        row.dy = p_.dy_is_scalar ? all_ : read(walk.in(p_.dy, walk.at));
        if (reads_x_) row.x = read(walk.in(p_.x, walk.at));
        if (reads_z_) row.z = read(walk.in(p_.z, walk.at));
        if (has_mask_) row.passed = load_bits(p_.mask, walk.offset(walk.at));
        walk.next(plan);
      }
#pragma unroll
      for (const Row& row : rows) finish(row);
    });
  }

  template <typename Formula>
  __device__ A at(const Formula& formula, const Row& row, int i, const Affine<A>& affine) const {
    const A dy = row.dy[i];
    if constexpr (kVariant == Variant::kPlain) {
      return dy;
    } else {
      A u = affine(row.x[i]);
      if (reads_z_) u += row.z[i];
      if constexpr (kVariant == Variant::kReluLike) {
        const bool passed = has_mask_ ? row.passed >> i & 1 : !formula.blocked(u);
        return passed ? dy : formula.held_back(dy);
      } else if constexpr (kVariant == Variant::kRelu) {
        return formula.blocked(u) ? 0 : dy;
      } else {
        return dy * formula.derivative(u);
      }
    }
  }

 private:
  static __device__ V read(const T* p) { return kLast ? load_last<kVector>(p) : load<kVector>(p); }

  const BackwardParams& p_;  // a reference: copies of its pointers would take registers
  bool reads_x_;
  bool has_mask_;
  bool reads_z_;
  V all_ = {};  // dy if it is one value
};

// Merges the gradient sums of all threads of a block by channel, and calls finish as merge_block does.
template <int kVector, typename Finish>
__device__ void merge_gradients(const Plan& plan, const Block& block, const Finish& finish) {
  const auto merge_channel = [](const Group& group, int count, const auto& get, const Parts<kVector>&) {
    return merge(group, count, get);
  };
  merge_block<kVector, GradSums>(plan, block, merge_channel, finish);
}

template <typename A>
struct Slope {
  A slope;
  A shift;
};

// The saved statistics of a channel that dweight and dx need.
struct SavedScale {
  double rstd;
  double scale;
};
template <typename A>
__device__ SavedScale load_scale(const BackwardParams& p, int64_t channel) {
  return {load_one(static_cast<const A*>(p.rstd) + channel), load_one(static_cast<const A*>(p.scale) + channel)};
}

// The coefficients of dx that follow from the sums of a channel.
template <typename A>
__device__ Slope<A> slope_of(const BackwardParams& p, const SavedScale& saved, const GradSums& total) {
  const double count = double(p.shape.values_per_channel());
  const double sum_dy_xhat = total.dy_centred * saved.rstd;
  return {static_cast<A>(-saved.scale * saved.rstd * sum_dy_xhat / count),
          static_cast<A>(-saved.scale * total.dy / count)};
}

inline __device__ void store_gradients(const BackwardParams& p, int64_t channel, double rstd, const GradSums& total) {
  write_param(p.dweight, p.params_dtype, channel, total.dy_centred * rstd);
  write_param(p.dbias, p.params_dtype, channel, total.dy);
}

template <typename A>
struct GradAffine {
  Affine<A> affine;
  Slope<A> slope;

  // `centred` is x - mean. In eval mode it is 0, and slope and shift are -0, so dx equals g * scale even in the sign of
  // a zero.
  __device__ A dx(A g, A centred) const { return g * affine.scale + (centred * slope.slope + slope.shift); }
};

}  // namespace bn_ext::cuda
