// Activations by name, and composed from ATen's operators; see activation.h.
#include "activation.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <limits>
#include <vector>

namespace bn_ext {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

struct Entry {
  std::string_view name;
  ActivationKind kind;
  double alpha;  // NaN: the operator's parameter
  double upper;
};

constexpr Entry kEntries[] = {
    {"relu", ActivationKind::kReluLike, 0, kNone},
    {"leaky_relu", ActivationKind::kReluLike, kNone, kNone},
    {"relu6", ActivationKind::kReluLike, 0, 6},
    {"elu", ActivationKind::kElu, kNone, kNone},
    {"silu", ActivationKind::kSilu, 0, kNone},
    {"gelu", ActivationKind::kGelu, 0, kNone},
    {"gelu_tanh", ActivationKind::kGeluTanh, 0, kNone},
    {"hardswish", ActivationKind::kHardswish, 0, kNone},
    {"sigmoid", ActivationKind::kSigmoid, 0, kNone},
    {"tanh", ActivationKind::kTanh, 0, kNone},
    {"mish", ActivationKind::kMish, 0, kNone},
};

at::Tensor blocked(const at::Tensor& u, const Activation& activation) {
  const at::Tensor low = u.le(0);
  return std::isnan(activation.upper) ? low : low.logical_or(u.ge(activation.upper));
}

at::Tensor relu_like_backward(const at::Tensor& g, const at::Tensor& is_blocked, const Activation& activation) {
  // Not inf * 0.
  const at::Tensor low = activation.alpha == 0 ? at::zeros_like(g) : g * activation.alpha;
  return at::where(is_blocked, low, g);
}

// Of the smooth kinds.
at::Tensor derivative(const at::Tensor& u, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kElu:
      return at::where(u.gt(0), at::ones_like(u), u.clamp_max(0).exp() * activation.alpha);
    case ActivationKind::kSilu: {
      const at::Tensor s = u.sigmoid();
      return s * (u * (1 - s) + 1);
    }
    case ActivationKind::kGelu: {
      const at::Tensor cdf = at::erfc(u * -std::sqrt(0.5)) * 0.5;
      return cdf + u * at::exp(u.square() * -0.5) * 0.39894228040143267794;  // 1 / sqrt(2 pi)
    }
    case ActivationKind::kGeluTanh: {
      const double twice = 1.5957691216057307118;  // 2 sqrt(2 / pi)
      const at::Tensor s = at::sigmoid(u * (u.square() * 0.044715 + 1) * twice);
      return s + u * s * (1 - s) * ((u.square() * (3 * 0.044715) + 1) * twice);
    }
    case ActivationKind::kHardswish: {
      const at::Tensor low = at::where(u.le(-3), at::zeros_like(u), u / 3 + 0.5);
      return at::where(u.ge(3), at::ones_like(u), low);
    }
    case ActivationKind::kSigmoid: {
      const at::Tensor s = u.sigmoid();
      return s * (1 - s);
    }
    case ActivationKind::kTanh:
      return 1 - u.tanh().square();
    case ActivationKind::kMish: {
      const at::Tensor t = at::softplus(u).tanh();
      return t + u * (1 - t.square()) * u.sigmoid();
    }
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
}

}  // namespace

Activation parse(const NamedActivation& activation) {
  if (!activation.name.has_value()) return {ActivationKind::kNone, 0, kNone};
  for (const Entry& entry : kEntries) {
    if (entry.name != *activation.name) continue;
    return {entry.kind, std::isnan(entry.alpha) ? activation.parameter : entry.alpha, entry.upper};
  }
  TORCH_CHECK_VALUE(false,
                    "activation must be relu, leaky_relu, relu6, elu, silu, gelu, gelu_tanh, hardswish, sigmoid, tanh, "
                    "mish or None, got ",
                    *activation.name);
}

at::Tensor composed_activation(const at::Tensor& u, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kNone:
      return u;
    case ActivationKind::kReluLike:
      if (!std::isnan(activation.upper)) return at::hardtanh(u, 0, activation.upper);
      return activation.alpha == 0 ? at::relu(u) : at::leaky_relu(u, activation.alpha);
    case ActivationKind::kElu:
      return at::elu(u, activation.alpha);
    case ActivationKind::kSilu:
      return at::silu(u);
    case ActivationKind::kGelu:
      return at::gelu(u);
    case ActivationKind::kGeluTanh:
      return at::gelu(u, "tanh");
    case ActivationKind::kHardswish:
      return at::hardswish(u);
    case ActivationKind::kSigmoid:
      return at::sigmoid(u);
    case ActivationKind::kTanh:
      return at::tanh(u);
    case ActivationKind::kMish:
      return at::mish(u);
  }
  return u;
}

at::Tensor composed_activation_backward(const at::Tensor& g, const at::Tensor& u, const Activation& activation) {
  if (activation.kind == ActivationKind::kNone) return g;
  if (activation.kind == ActivationKind::kReluLike) return relu_like_backward(g, blocked(u, activation), activation);
  return g * derivative(u, activation);
}

at::Tensor composed_mask_backward(const at::Tensor& g,
                                  const at::Tensor& mask,
                                  at::MemoryFormat format,
                                  const Activation& activation) {
  const at::Tensor bits = at::arange(8, mask.options()).unsqueeze(0);
  const at::Tensor is_blocked = mask.unsqueeze(1).bitwise_right_shift(bits).bitwise_and(1).eq(0).flatten();
  const at::Tensor in_memory_order = is_blocked.narrow_symint(0, 0, g.sym_numel());
  if (format == at::MemoryFormat::Contiguous) {
    return relu_like_backward(g, in_memory_order.view_symint(g.sym_sizes()), activation);
  }
  std::vector<c10::SymInt> sizes = g.sym_sizes().vec();  // (N, C, ...) to (N, ..., C)
  sizes.push_back(sizes[1]);
  sizes.erase(sizes.begin() + 1);
  return relu_like_backward(g, in_memory_order.view_symint(sizes).movedim(-1, 1), activation);
}

}  // namespace bn_ext
