// The arithmetic of one channel: from its sums to running statistics and coefficients, in double.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>

#include "../params.h"
#include "kernels.h"

namespace bn_ext::cpu {

// p[i] of a (C,) vector; `otherwise` if there is none.
inline double read_param(const void* p, DType dtype, int64_t i, double otherwise) {
  if (p == nullptr) return otherwise;
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(p)[i];
    case DType::kFloat64:
      return static_cast<const double*>(p)[i];
    case DType::kFloat16:
      return static_cast<float>(static_cast<const c10::Half*>(p)[i]);
    case DType::kBFloat16:
      return static_cast<float>(static_cast<const c10::BFloat16*>(p)[i]);
  }
  return otherwise;
}

inline void write_param(void* p, DType dtype, int64_t i, double value) {
  if (p == nullptr) return;
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(p)[i] = value;
      break;
    case DType::kFloat16:
      static_cast<c10::Half*>(p)[i] = static_cast<c10::Half>(static_cast<float>(value));
      break;
    case DType::kBFloat16:
      static_cast<c10::BFloat16*>(p)[i] = static_cast<c10::BFloat16>(static_cast<float>(value));
      break;
  }
}

// One channel's moments in double throughout, two passes: for data whose squares overflow the accumulate type.
template <typename T, typename ToDouble>
Moments moments_in_double(const Shape& shape, const T* x, int64_t c, const ToDouble& to_double) {
  const auto sum_of = [&](const auto& term) {
    double sum = 0;
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t s = 0; s < shape.s; ++s) {
        const int64_t i = shape.channels_last ? (n * shape.s + s) * shape.c + c : (n * shape.c + c) * shape.s + s;
        sum += term(to_double(x[i]));
      }
    }
    return sum;
  };
  const double mean = sum_of([](double value) { return value; }) / double(shape.values_per_channel());
  if (!std::isfinite(mean)) return {mean, std::nan("")};
  return {mean, sum_of([mean](double value) { return (value - mean) * (value - mean); })};
}

// What a channel's u is made with, in the accumulate type, as it is saved: u = (x - mean) * scale + offset.
template <typename A>
struct ChannelAffine {
  A mean;
  A rstd;
  A scale;
  A offset;
};

template <typename A>
A scale_of(const ForwardParams& p, int64_t c, A rstd) {
  return static_cast<A>(rstd * read_param(p.weight, p.params_dtype, c, 1));
}

// Training: updates the running statistics of channel c. `momentum` is this batch's weight in them. The offset makes up
// for the mean's rounding.
template <typename A>
ChannelAffine<A> affine_of_batch(const ForwardParams& p, int64_t c, const Moments& moments, double momentum) {
  const double count = double(p.shape.values_per_channel());
  const double var = moments.m2 / count;
  const auto updated = [&](const void* running, double value) {
    return momentum * value + (1 - momentum) * read_param(running, p.params_dtype, c, 0);
  };
  const double running_mean = updated(p.running_mean, moments.mean);
  const double running_var = updated(p.running_var, moments.m2 / (count - 1));
  if (!p.skip_nonfinite || (can_hold(p.params_dtype, running_mean) && can_hold(p.params_dtype, running_var))) {
    write_param(p.running_mean, p.params_dtype, c, running_mean);
    write_param(p.running_var, p.params_dtype, c, running_var);
  }
  const A mean = static_cast<A>(moments.mean);
  const A rstd = static_cast<A>(1 / std::sqrt(var + p.eps));
  const A scale = scale_of(p, c, rstd);
  const double offset = read_param(p.bias, p.params_dtype, c, 0) - (moments.mean - mean) * scale;
  return {mean, rstd, scale, static_cast<A>(offset)};
}

// Eval.
template <typename A>
ChannelAffine<A> affine_of_running(const ForwardParams& p, int64_t c) {
  const A mean = static_cast<A>(read_param(p.running_mean, p.params_dtype, c, 0));
  const A rstd = static_cast<A>(1 / std::sqrt(read_param(p.running_var, p.params_dtype, c, 1) + p.eps));
  return {mean, rstd, scale_of(p, c, rstd), static_cast<A>(read_param(p.bias, p.params_dtype, c, 0))};
}

// A repeated forward pass.
template <typename A>
ChannelAffine<A> affine_of_saved(const ForwardParams& p, int64_t c) {
  const auto read = [c](const void* saved) { return static_cast<const A*>(saved)[c]; };
  return {read(p.mean), read(p.rstd), read(p.scale), read(p.offset)};
}

}  // namespace bn_ext::cpu
