// Autograd around the inner operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "batch_norm.h"
#include "checks.h"

namespace bn_ext {

// Whether backward computes the activation's input u + z and so needs bias and residual. With a mask it does not.
bool saves_u(const BatchNormArguments& args);

// Returns y, differentiable, and saved.
TensorAndSaved differentiable_batch_norm(const BatchNormArguments& args);

// The inner operator of eval, for direct calls that autograd records.
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
