// The inner operators, from tensors to tensors, without autograd. They check their arguments (checks.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"

namespace bn_ext {

using OptionalName = std::optional<std::string_view>;
// y, and the saved statistics from which batch_norm_repeat recomputes it; undefined if it cannot.
using TensorAndSaved = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Activations are specified by name and parameter; see activation.h. `saved` is (4, C), in float64 for float64 input,
// otherwise in float32: the mean and rstd that normalise input, and scale and offset, so that
// y = activation((input - mean) * scale + offset + residual).

// Training: returns y, saved, mask. Updates the running statistics and num_batches_tracked in place. An empty batch
// only increments num_batches_tracked. The last two arguments are those of Skip in arguments.h. With a mask_format, y
// has that memory format, and mask has one bit per value, in y's order, that is 1 if relu, leaky_relu or relu6 let the
// value pass (params.h). Without mask_format, y has input's memory format and mask is empty.
ThreeTensors batch_norm_forward(const at::Tensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                const OptionalTensor& residual,
                                std::optional<double> momentum,
                                double eps,
                                OptionalName activation,
                                double activation_parameter,
                                OptionalFormat mask_format,
                                bool skip_nonfinite,
                                bool skip_recomputed);

// Eval: returns the same, computed with the running statistics. Changes no argument.
ThreeTensors batch_norm_inference(const at::Tensor& input,
                                  const OptionalTensor& weight,
                                  const OptionalTensor& bias,
                                  const at::Tensor& running_mean,
                                  const at::Tensor& running_var,
                                  const OptionalTensor& residual,
                                  double eps,
                                  OptionalName activation,
                                  double activation_parameter,
                                  OptionalFormat mask_format);

// The forward pass in the mode of `args`, without the operators' checks. Without mask_format, the returned mask is
// undefined.
ThreeTensors batch_norm_of_checked(const BatchNormArguments& args, OptionalFormat mask_format);

// Recomputes y of either forward pass, bit-equal, from its saved statistics.
at::Tensor batch_norm_repeat(const at::Tensor& input,
                             const at::Tensor& saved,
                             const OptionalTensor& residual,
                             OptionalName activation,
                             double activation_parameter);

// Returns those of dx, dweight, dbias and dresidual that `output_mask` requests. The others are empty if kAllDefined,
// as an operator must return them, otherwise undefined. dweight and dbias have weight's dtype, or else saved's.
// With a mask the residual is not needed, and dx and dresidual have the memory format mask_format, whatever input's is:
// compilers choose memory formats separately for the forward and the backward graph.
template <bool kAllDefined>
FourTensors batch_norm_backward(const at::Tensor& dy,
                                const at::Tensor& input,
                                const OptionalTensor& weight,
                                const at::Tensor& saved,
                                const OptionalTensor& residual,
                                const OptionalTensor& mask,
                                OptionalFormat mask_format,
                                bool training,
                                OptionalName activation,
                                double activation_parameter,
                                std::array<bool, 4> output_mask);

}  // namespace bn_ext
