// Per-channel arithmetic in double: computes running statistics, saved vectors and coefficients from sums. It works on
// blocks of channels, in loops that the compiler vectorises, because with small planes it is much of the work.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>

#include "../params.h"
#include "kernels.h"

namespace bn_ext::cpu {

constexpr int64_t kChannelBlock = 128;  // channels that are computed together, at most

using ChannelValues = double[kChannelBlock];

// Calls body with a value of the dtype's C++ type.
template <typename Body>
void with_param_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(c10::Half{});
    case DType::kBFloat16:
      return body(c10::BFloat16{});
  }
}

// Reads the values [begin, begin + n) of a (C,) vector; `otherwise` if p is null.
inline void read_params(const void* p, DType dtype, int64_t begin, int64_t n, double otherwise, ChannelValues& out) {
  if (p == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = otherwise;
    return;
  }
  with_param_type(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(p) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(values[i]);
  });
}

inline void write_params(void* p, DType dtype, int64_t begin, int64_t n, const ChannelValues& values) {
  if (p == nullptr) return;
  with_param_type(dtype, [&](auto type) {
    auto* out = static_cast<decltype(type)*>(p) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<decltype(type)>(values[i]);
  });
}

// Computes one channel's moments in double and reads it twice, for data whose squares overflow the accumulate type.
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

// The saved vectors from channel `begin` on, in the accumulate type: u = (x - mean) * scale + offset.
template <typename A>
struct SavedVectors {
  A* mean;
  A* rstd;
  A* scale;
  A* offset;

  SavedVectors(const ForwardParams& p, int64_t begin)
      : mean(static_cast<A*>(p.mean) + begin),
        rstd(static_cast<A*>(p.rstd) + begin),
        scale(static_cast<A*>(p.scale) + begin),
        offset(static_cast<A*>(p.offset) + begin) {}
};

// Training: updates the running statistics of n channels. `momentum` is this batch's weight in them.
inline void update_running(const ForwardParams& p, double momentum, int64_t begin, int64_t n, const Moments* moments) {
  if (p.running_mean == nullptr) return;
  const double count = double(p.shape.values_per_channel());
  ChannelValues mean, var;
  read_params(p.running_mean, p.params_dtype, begin, n, 0, mean);
  read_params(p.running_var, p.params_dtype, begin, n, 0, var);
  for (int64_t i = 0; i < n; ++i) {
    const double new_mean = momentum * moments[i].mean + (1 - momentum) * mean[i];
    const double new_var = momentum * (moments[i].m2 / (count - 1)) + (1 - momentum) * var[i];
    const bool keeps = p.skip_nonfinite && !(can_hold(p.params_dtype, new_mean) && can_hold(p.params_dtype, new_var));
    mean[i] = keeps ? mean[i] : new_mean;
    var[i] = keeps ? var[i] : new_var;
  }
  write_params(p.running_mean, p.params_dtype, begin, n, mean);
  write_params(p.running_var, p.params_dtype, begin, n, var);
}

// Stores the saved vectors of n channels with this mean and variance. In training, offset corrects mean's rounding.
template <typename A>
void save_affine(
    const ForwardParams& p, int64_t begin, int64_t n, const ChannelValues& mean, const ChannelValues& var) {
  ChannelValues weight, bias;
  read_params(p.weight, p.params_dtype, begin, n, 1, weight);
  read_params(p.bias, p.params_dtype, begin, n, 0, bias);
  const SavedVectors<A> saved(p, begin);
  for (int64_t i = 0; i < n; ++i) {
    saved.mean[i] = static_cast<A>(mean[i]);
    saved.rstd[i] = static_cast<A>(1 / std::sqrt(var[i] + p.eps));
    saved.scale[i] = static_cast<A>(saved.rstd[i] * weight[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double correction = p.training ? (mean[i] - saved.mean[i]) * saved.scale[i] : 0;
    saved.offset[i] = static_cast<A>(bias[i] - correction);
  }
}

// Training: stores the running statistics and saved vectors of n channels, from their moments.
template <typename A>
void save_batch(const ForwardParams& p, double momentum, int64_t begin, int64_t n, const Moments* moments) {
  update_running(p, momentum, begin, n, moments);
  const double count = double(p.shape.values_per_channel());
  ChannelValues mean, var;
  for (int64_t i = 0; i < n; ++i) {
    mean[i] = moments[i].mean;
    var[i] = moments[i].m2 / count;
  }
  save_affine<A>(p, begin, n, mean, var);
}

// Eval: stores the saved vectors of n channels, from their running statistics.
template <typename A>
void save_running(const ForwardParams& p, int64_t begin, int64_t n) {
  ChannelValues mean, var;
  read_params(p.running_mean, p.params_dtype, begin, n, 0, mean);
  read_params(p.running_var, p.params_dtype, begin, n, 1, var);
  save_affine<A>(p, begin, n, mean, var);
}

// Backward: stores dweight, dbias and, in training, slope and shift: dx = g * scale + (x - mean) * slope + shift.
template <typename A>
void save_gradients(const BackwardParams& p, int64_t begin, int64_t n, const GradSums* sums, A* slope, A* shift) {
  const A* rstd = static_cast<const A*>(p.rstd) + begin;
  const A* scale = static_cast<const A*>(p.scale) + begin;
  const double count = double(p.shape.values_per_channel());
  ChannelValues dweight, dbias;
  for (int64_t i = 0; i < n; ++i) {
    dweight[i] = sums[i].dy_centred * rstd[i];
    dbias[i] = sums[i].dy;
  }
  for (int64_t i = 0; p.training && i < n; ++i) {
    slope[i] = static_cast<A>(-double(scale[i]) * rstd[i] * dweight[i] / count);
    shift[i] = static_cast<A>(-double(scale[i]) * dbias[i] / count);
  }
  write_params(p.dweight, p.params_dtype, begin, n, dweight);
  write_params(p.dbias, p.params_dtype, begin, n, dbias);
}

}  // namespace bn_ext::cpu
