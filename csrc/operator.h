// The public operator, for calls from torch and from Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "batch_norm.h"

namespace bn_ext {

// torch.nn.functional.batch_norm with additions: training also increments num_batches_tracked, accepts momentum=None
// for the mean over all batches, and may skip updates (arguments.h). It can add a residual and apply an activation.
at::Tensor batch_norm(const at::Tensor& input,
                      const OptionalTensor& running_mean,
                      const OptionalTensor& running_var,
                      const OptionalTensor& weight,
                      const OptionalTensor& bias,
                      bool training,
                      std::optional<double> momentum,
                      double eps,
                      const OptionalTensor& num_batches_tracked,
                      const OptionalTensor& residual,
                      OptionalName activation,
                      double activation_parameter,
                      bool skip_nonfinite,
                      bool skip_recomputed);

// The activation alone, which TorchScript calls after torch's own batch norm.
at::Tensor activate(const at::Tensor& input, std::string_view activation, double activation_parameter);

// A double that bindings.cpp converts from Python as torch does.
struct Number {
  double value;
  operator double() const { return value; }
};

// The same for calls from Python that do not use the dispatcher. Result is at::Tensor or TensorAndSaved.
template <typename Result>
Result batch_norm_from_python(const at::Tensor& input,
                              const OptionalTensor& running_mean,
                              const OptionalTensor& running_var,
                              const OptionalTensor& weight,
                              const OptionalTensor& bias,
                              bool training,
                              std::optional<Number> momentum,
                              Number eps,
                              const OptionalTensor& num_batches_tracked,
                              const OptionalTensor& residual,
                              OptionalName activation,
                              double activation_parameter,
                              bool skip_nonfinite,
                              bool skip_recomputed);

}  // namespace bn_ext
