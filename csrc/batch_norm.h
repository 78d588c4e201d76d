// The inner operators: tensors in, tensors out, no autograd. Arguments have been checked (checks.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"

namespace bn_ext {

using OptionalName = std::optional<std::string_view>;
// y, and what batch_norm_repeat needs to compute it again; undefined where it cannot.
using TensorAndSaved = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Activations are given by name and parameter; see activation.h. `saved` is (4, C), float64 for float64 input, else
// float32: mean and rstd of what input was normalised with, and scale and offset, with which
// y = activation((input - mean) * scale + offset + residual).

// Training: y, saved, mask. Updates the running statistics and num_batches_tracked in place. An empty batch only raises
// num_batches_tracked. The last two arguments are those of Skip in arguments.h. With a mask_format, y is of that memory
// format, and mask tells where relu, leaky_relu or relu6 let values pass, one bit each in y's order (params.h);
// without, y has input's and mask is empty.
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

// Eval: the same of the running statistics; writes nothing else.
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

// The forward pass of the mode that `args` asks for, without the operators' checks. Without a mask_format, mask is
// undefined.
ThreeTensors batch_norm_of_checked(const BatchNormArguments& args, OptionalFormat mask_format);

// y of either once more, bit-equal, from what it saved.
at::Tensor batch_norm_repeat(const at::Tensor& input,
                             const at::Tensor& saved,
                             const OptionalTensor& residual,
                             OptionalName activation,
                             double activation_parameter);

// dx, dweight, dbias, dresidual where `output_mask` says so, else an empty tensor, or an undefined one where not all
// are to be defined, as an operator's must be. dweight and dbias have weight's dtype; without a weight, that of saved.
// With a mask the residual is not needed, and dx and dresidual are of the format in which forward was asked for it: of
// whatever layout input has become, as compilers choose layouts of their own for the forward and the backward graph.
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
