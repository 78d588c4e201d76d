// Finds activations by name.
#include "activation.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

namespace bn_ext {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

struct Entry {
  std::string_view name;
  ActivationKind kind;
  double alpha;  // NaN: the operator's parameter is used
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

}  // namespace bn_ext
