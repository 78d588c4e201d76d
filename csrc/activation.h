// Activations by name. The kernels' formulas are in activation.inl.
#pragma once

#include <optional>
#include <string_view>

#include "params.h"

namespace bn_ext {

// An activation as the operators take it. The name is one of torch.nn.functional or gelu_tanh, or absent. The parameter
// is negative_slope for leaky_relu and alpha for elu; the others do not use it.
struct NamedActivation {
  std::optional<std::string_view> name;
  double parameter;
};

// Throws for an unknown name.
Activation parse(const NamedActivation& activation);

}  // namespace bn_ext
