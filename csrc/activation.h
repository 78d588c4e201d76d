// Activations by name, and composed from ATen's operators; the kernels' formulas are in activation.inl.
#pragma once

#include <ATen/core/Tensor.h>

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

// Differentiable to any order.
at::Tensor composed_activation(const at::Tensor& u, const Activation& activation);
// g * activation'(u)
at::Tensor composed_activation_backward(const at::Tensor& g, const at::Tensor& u, const Activation& activation);
// The same for kReluLike, from the mask of a forward pass whose y had g's sizes and this memory format.
at::Tensor composed_mask_backward(const at::Tensor& g,
                                  const at::Tensor& mask,
                                  at::MemoryFormat format,
                                  const Activation& activation);

}  // namespace bn_ext
