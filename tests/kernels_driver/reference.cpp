// The formulas of csrc/README.md, channel by channel, each result with the largest error that rounding explains.
#include "reference.h"

#include <cmath>

namespace kernels_driver {
namespace {

// Largest error of what is computed in float32 (float64 for float64), in units of its eps and of the magnitude of the
// terms that a result is made of: 4 for batch norm, as in bn_ext.testing.TOLERANCE; times the steepest slope of any
// activation and of any derivative, 1.5; and 2 for the activation's own arithmetic.
constexpr double kArithmetic = 8;

// What a result is rounded by when it is stored: half a unit in the last place, with some room because what is rounded
// is itself a little off; of subnormal numbers a step.
double rounding(DType dtype, Real value) {
  return static_cast<double>(0.505 * eps_of(dtype) * std::fabs(value) + step_of(dtype));
}

struct Channel {
  Real mean, var, rstd, weight, bias;
};

// One value's terms. Sizes are the same formulas on the absolute values of their terms.
struct Terms {
  Real xhat, xhat_size, u, size, g, g_error;
};

class Formulas {
 public:
  Formulas(const Case& c, Inputs& inputs) : c_(c), inputs_(inputs), count_(c.shape.values_per_channel()) {
    arithmetic_ = kArithmetic * eps_of(accumulate_dtype(c.dtype));
    reference_.passed.resize(c.shape.numel());
    reference_.near_kink.resize(c.shape.numel());
  }

  Reference take() {
    for (int64_t channel = 0; channel < c_.shape.c; ++channel) add(channel);
    return std::move(reference_);
  }

 private:
  Result& make(const char* name, int64_t count) {
    return reference_.results[name] = {Values(count), Values(count)};  // stays where it is
  }

  // error: of the arithmetic alone.
  void set(Result& result, int64_t i, DType dtype, Real value, Real error) {
    result.values[i] = std::fabs(value) > largest_of(dtype) ? std::copysign(INFINITY, static_cast<double>(value))
                                                            : static_cast<double>(value);
    result.errors[i] = static_cast<double>(error) + rounding(dtype, value);
  }

  // Where the i-th value of a channel lies.
  int64_t place(int64_t channel, int64_t i) const {
    const auto& [n, c, s, channels_last] = c_.shape;
    return channels_last ? i * c + channel : (i / s * c + channel) * s + i % s;
  }

  void add(int64_t channel) {
    const Channel own = statistics(channel);
    std::vector<Terms> terms(count_);
    for (int64_t i = 0; i < count_; ++i) terms[i] = forward(own, place(channel, i));
    backward(own, channel, terms);
  }

  Channel statistics(int64_t channel) {
    Channel own = {inputs_.running_mean[channel], inputs_.running_var[channel], 0, 1, 0};
    if (c_.has_params) own.weight = inputs_.weight[channel], own.bias = inputs_.bias[channel];
    if (c_.training) {
      own.mean = own.var = 0;
      for (int64_t i = 0; i < count_; ++i) own.mean += inputs_.x[place(channel, i)] / Real(count_);
      for (int64_t i = 0; i < count_; ++i) {
        const Real deviation = inputs_.x[place(channel, i)] - own.mean;
        own.var += deviation * deviation / count_;
      }
    }
    own.rstd = 1 / std::sqrt(own.var + Real{kEps});
    const Real scale = own.rstd * own.weight, size = std::fabs(own.mean) + std::sqrt(own.var);
    const DType saved = accumulate_dtype(c_.dtype);
    set(mean_, channel, saved, own.mean, arithmetic_ * size);
    set(rstd_, channel, saved, own.rstd, arithmetic_ * own.rstd);
    set(scale_, channel, saved, scale, arithmetic_ * std::fabs(scale));
    set(offset_, channel, saved, own.bias, arithmetic_ * (std::fabs(own.bias) + size * std::fabs(scale)));
    running_statistics(own, channel, size);
    return own;
  }

  void running_statistics(const Channel& own, int64_t channel, Real size) {
    const Real old_mean = inputs_.running_mean[channel], old_var = inputs_.running_var[channel];
    Real momentum = c_.training ? Real{c_.huge ? 1 : kMomentum} : 0;
    if (c_.cumulative) momentum = 1 / Real(inputs_.num_batches_tracked + 1);
    const Real unbiased = own.var * count_ / (count_ - 1);
    Real mean = momentum * own.mean + (1 - momentum) * old_mean;
    Real var = momentum * unbiased + (1 - momentum) * old_var;
    const double largest = largest_of(c_.params_dtype);
    if (c_.skip_nonfinite && (std::fabs(mean) > largest || var > largest)) mean = old_mean, var = old_var;
    set(running_mean_, channel, c_.params_dtype, mean, arithmetic_ * (momentum * size + std::fabs(old_mean)));
    set(running_var_, channel, c_.params_dtype, var, arithmetic_ * (momentum * unbiased + old_var));
  }

  Terms forward(const Channel& own, int64_t at) {
    Terms t;
    t.xhat = (inputs_.x[at] - own.mean) * own.rstd;
    // The mean is off by rounding errors of values as large as itself and the deviation.
    t.xhat_size = std::fabs(t.xhat) + std::fabs(own.mean) * own.rstd + 1;
    const Real z = c_.has_residual ? inputs_.z[at] : 0;
    t.u = t.xhat * own.weight + own.bias + z;
    t.size = t.xhat_size * std::fabs(own.weight) + std::fabs(own.bias) + std::fabs(z);
    const Real y = value_of(c_.activation.activation, t.u);
    set(y_, at, c_.dtype, y, arithmetic_ * (t.size + std::fabs(y)));

    reference_.passed[at] = derivative_of(c_.activation.activation, t.u) == 1;
    for (const double kink : c_.activation.kinks) {
      if (std::fabs(t.u - kink) <= arithmetic_ * t.size) reference_.near_kink[at] = true;
    }
    if (reference_.near_kink[at] && !c_.dy_is_scalar) inputs_.dy[at] = 0;
    const Real dy = inputs_.dy[c_.dy_is_scalar ? 0 : at];
    t.g = dy * derivative_of(c_.activation.activation, t.u);
    t.g_error = arithmetic_ * std::fabs(dy) * (t.size + 1);
    set(dz_, at, c_.dtype, t.g, t.g_error);
    t.g_error += arithmetic_ * std::fabs(t.g);
    return t;
  }

  void backward(const Channel& own, int64_t channel, const std::vector<Terms>& terms) {
    Real sum_dy = 0, sum_dy_xhat = 0, error = 0, error_xhat = 0;
    for (const Terms& t : terms) {
      sum_dy += t.g;
      sum_dy_xhat += t.g * t.xhat;
      error += t.g_error;
      error_xhat += t.g_error * t.xhat_size;
    }
    set(dweight_, channel, c_.params_dtype, sum_dy_xhat, error_xhat);
    set(dbias_, channel, c_.params_dtype, sum_dy, error);
    const Real share = c_.training ? 1 / Real(count_) : 0;  // in eval mode the statistics do not depend on x
    const Real scale = own.weight * own.rstd;
    for (int64_t i = 0; i < count_; ++i) {
      const Terms& t = terms[i];
      const Real dx = scale * (t.g - share * (sum_dy + t.xhat * sum_dy_xhat));
      const Real dx_error = t.g_error + share * (error + t.xhat_size * error_xhat);
      set(dx_, place(channel, i), c_.dtype, dx, std::fabs(scale) * dx_error);
    }
  }

  const Case& c_;
  Inputs& inputs_;
  int64_t count_;
  double arithmetic_;
  Reference reference_;
  Result& y_ = make("y", c_.shape.numel());
  Result& dx_ = make("dx", c_.shape.numel());
  Result& dz_ = make("dz", c_.shape.numel());
  Result& mean_ = make("mean", c_.shape.c);
  Result& rstd_ = make("rstd", c_.shape.c);
  Result& scale_ = make("scale", c_.shape.c);
  Result& offset_ = make("offset", c_.shape.c);
  Result& running_mean_ = make("running_mean", c_.shape.c);
  Result& running_var_ = make("running_var", c_.shape.c);
  Result& dweight_ = make("dweight", c_.shape.c);
  Result& dbias_ = make("dbias", c_.shape.c);
};

}  // namespace

Reference make_reference(const Case& c, Inputs& inputs) { return Formulas(c, inputs).take(); }

}  // namespace kernels_driver
