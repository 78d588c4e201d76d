// The activations as torch.nn.functional defines them.
#include "activations.h"

#include <cmath>

namespace kernels_driver {
namespace {

using bn_ext::ActivationKind;

constexpr double kNever = NAN;  // as an upper end

Real sigmoid(Real u) { return 1 / (1 + std::exp(-u)); }
Real normal_cdf(Real u) { return std::erfc(-u / std::sqrt(Real{2})) / 2; }
Real softplus(Real u) { return std::log1p(std::exp(u)); }

const Real kPi = std::acos(Real{-1});
Real tanh_argument(Real u) { return std::sqrt(2 / kPi) * (u + Real{0.044715L} * u * u * u); }
Real tanh_argument_slope(Real u) { return std::sqrt(2 / kPi) * (1 + 3 * Real{0.044715L} * u * u); }

}  // namespace

const NamedActivation& identity() {
  static const NamedActivation none = {"no activation", {ActivationKind::kNone, 0, kNever}, {}};
  return none;
}

const std::vector<NamedActivation>& relu_likes() {
  static const std::vector<NamedActivation> list = {
      {"relu", {ActivationKind::kReluLike, 0, kNever}, {0}},
      {"leaky_relu", {ActivationKind::kReluLike, 0.2, kNever}, {0}},
      {"relu6", {ActivationKind::kReluLike, 0, 6}, {0, 6}},
  };
  return list;
}

const std::vector<NamedActivation>& others() {
  static const std::vector<NamedActivation> list = {
      {"elu", {ActivationKind::kElu, 1.5, kNever}, {0}},
      {"silu", {ActivationKind::kSilu, 0, kNever}, {}},
      {"gelu", {ActivationKind::kGelu, 0, kNever}, {}},
      {"gelu_tanh", {ActivationKind::kGeluTanh, 0, kNever}, {}},
      {"hardswish", {ActivationKind::kHardswish, 0, kNever}, {-3, 3}},
      {"sigmoid", {ActivationKind::kSigmoid, 0, kNever}, {}},
      {"tanh", {ActivationKind::kTanh, 0, kNever}, {}},
      {"mish", {ActivationKind::kMish, 0, kNever}, {}},
  };
  return list;
}

Real value_of(const bn_ext::Activation& activation, Real u) {
  const Real alpha = activation.alpha, upper = activation.upper;
  switch (activation.kind) {
    case ActivationKind::kNone:
      return u;
    case ActivationKind::kReluLike:
      return u <= 0 ? alpha * u : u >= upper ? upper : u;
    case ActivationKind::kElu:
      return u > 0 ? u : alpha * std::expm1(u);
    case ActivationKind::kSilu:
      return u * sigmoid(u);
    case ActivationKind::kGelu:
      return u * normal_cdf(u);
    case ActivationKind::kGeluTanh:
      return u * (1 + std::tanh(tanh_argument(u))) / 2;
    case ActivationKind::kHardswish:
      return u * std::fmin(std::fmax(u + 3, Real{0}), Real{6}) / 6;
    case ActivationKind::kSigmoid:
      return sigmoid(u);
    case ActivationKind::kTanh:
      return std::tanh(u);
    case ActivationKind::kMish:
      return u * std::tanh(softplus(u));
  }
  return NAN;
}

Real derivative_of(const bn_ext::Activation& activation, Real u) {
  const Real alpha = activation.alpha, upper = activation.upper;
  switch (activation.kind) {
    case ActivationKind::kNone:
      return 1;
    case ActivationKind::kReluLike:
      return u <= 0 || u >= upper ? alpha : 1;
    case ActivationKind::kElu:
      return u > 0 ? 1 : alpha * std::exp(u);
    case ActivationKind::kSilu:
      return sigmoid(u) * (1 + u * (1 - sigmoid(u)));
    case ActivationKind::kGelu:
      return normal_cdf(u) + u * std::exp(-u * u / 2) / std::sqrt(2 * kPi);
    case ActivationKind::kGeluTanh: {
      const Real t = std::tanh(tanh_argument(u));
      return (1 + t) / 2 + u * (1 - t * t) * tanh_argument_slope(u) / 2;
    }
    case ActivationKind::kHardswish:
      return u <= -3 ? 0 : u >= 3 ? 1 : u / 3 + Real{0.5};
    case ActivationKind::kSigmoid:
      return sigmoid(u) * (1 - sigmoid(u));
    case ActivationKind::kTanh:
      return 1 - std::tanh(u) * std::tanh(u);
    case ActivationKind::kMish: {
      const Real t = std::tanh(softplus(u));
      return t + u * (1 - t * t) * sigmoid(u);
    }
  }
  return NAN;
}

}  // namespace kernels_driver
