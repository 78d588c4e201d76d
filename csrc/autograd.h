// Autograd around the inner operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "batch_norm.h"
#include "checks.h"

namespace bn_ext {

// Whether backward needs what is before the activation, u + z, and so bias and residual: not where a mask tells all.
bool saves_u(const BatchNormArguments& args);

// y, with its backward pass.
TensorAndSaved differentiable_batch_norm(const BatchNormArguments& args);

// The inner operator of eval, where it is called as such and differentiated.
ThreeTensors differentiable_inference(const at::Tensor& input,
                                      const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const at::Tensor& running_mean,
                                      const at::Tensor& running_var,
                                      const OptionalTensor& residual,
                                      double eps,
                                      OptionalName activation,
                                      double activation_parameter,
                                      OptionalFormat mask_format);

}  // namespace bn_ext
