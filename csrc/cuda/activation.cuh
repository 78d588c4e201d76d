// Activations in kernels: the formulas of ../activation.inl on single numbers, and their selection by variant.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "plan.h"
#include "vector.cuh"

namespace bn_ext::cuda {

inline __device__ float exp_of(float u) { return expf(u); }
inline __device__ double exp_of(double u) { return exp(u); }
inline __device__ float expm1_of(float u) { return expm1f(u); }
inline __device__ double expm1_of(double u) { return expm1(u); }
inline __device__ float tanh_of(float u) { return tanhf(u); }
inline __device__ double tanh_of(double u) { return tanh(u); }
// erfc keeps its digits in the left tail, where 1 + erf cancels. The factor is -1 / sqrt(2).
inline __device__ float normal_cdf_of(float u) { return 0.5f * erfcf(u * -0.70710678118654752440f); }
inline __device__ double normal_cdf_of(double u) { return 0.5 * erfc(u * -0.70710678118654752440); }

#define BN_EXT_INLINE __device__ __forceinline__
#include "../activation.inl"
#undef BN_EXT_INLINE

struct Relu {
  template <typename A>
  __device__ bool blocked(A u) const {
    return u <= 0;
  }
};

struct Identity {
  template <typename A>
  __device__ A value(A u) const {
    return u;
  }
};

// Calls body(formula). For kAny, the compiler generates a copy of the body per formula.
template <Variant kVariant, typename A, typename Body>
__device__ __forceinline__ void with_activation(const Activation& activation, const Body& body) {
  if constexpr (kVariant == Variant::kPlain) {
    body(Identity{});
  } else if constexpr (kVariant == Variant::kRelu) {
    body(Relu{});
  } else if constexpr (kVariant == Variant::kReluLike) {
    const bool passes_all = activation.kind == ActivationKind::kNone;
    body(ReluLike<A>{static_cast<A>(passes_all ? 1 : activation.alpha),
                     static_cast<A>(passes_all ? NAN : activation.upper)});
  } else {
    with_formula<A>(activation, body);
  }
}

// u, before the residual is added. The explicit fma fixes the rounding, whatever the compiler would fuse, so all
// kernels of both passes get the same bits from the same mean, scale and offset.
template <typename A>
struct Affine {
  A mean;
  A scale;
  A offset;

  __device__ A operator()(A x) const { return fma(x - mean, scale, offset); }
};

// Loads a channel's coefficients from the saved statistics; those that are not wanted are 0. Params: ForwardParams or
// BackwardParams.
template <typename A, typename Params>
__device__ Affine<A> saved_affine(const Params& p, int64_t channel, bool wants_scale = true, bool wants_offset = true) {
  const auto read = [channel](const void* vector) { return load_one(static_cast<const A*>(vector) + channel); };
  return {read(p.mean), wants_scale ? read(p.scale) : 0, wants_offset ? read(p.offset) : 0};
}

}  // namespace bn_ext::cuda
