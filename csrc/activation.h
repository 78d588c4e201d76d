// Activations by name; the kernels' formulas are in activation.inl.
#pragma once

#include <optional>
#include <string_view>

#include "params.h"

namespace bn_ext {

// As operators are given it: a name of torch.nn.functional, gelu_tanh, or nothing; negative_slope of leaky_relu, alpha
// of elu, and unused by the others.
struct NamedActivation {
  std::optional<std::string_view> name;
  double parameter;
};

// Throws for an unknown name.
Activation parse(const NamedActivation& activation);

}  // namespace bn_ext
