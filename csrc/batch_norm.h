// The inner operators: tensors in, tensors out, no autograd. Arguments have been checked (checks.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace bn_ext {

using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Training: y, and mean and rstd of the batch, (C,), float64 for float64 input, else float32. Updates the running
// statistics and num_batches_tracked in place. An empty batch only raises num_batches_tracked.
ThreeTensors batch_norm_forward(const at::Tensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                std::optional<double> momentum,
                                double eps);

// Eval: the same of the running statistics; writes nothing else.
ThreeTensors batch_norm_inference(const at::Tensor& input,
                                  const OptionalTensor& weight,
                                  const OptionalTensor& bias,
                                  const at::Tensor& running_mean,
                                  const at::Tensor& running_var,
                                  double eps);

// dx, dweight, dbias where `output_mask` says so, else an empty tensor. mean and rstd are those that forward returned.
// dweight and dbias have weight's dtype; without a weight, that of mean.
ThreeTensors batch_norm_backward(const at::Tensor& dy,
                                 const at::Tensor& input,
                                 const OptionalTensor& weight,
                                 const at::Tensor& mean,
                                 const at::Tensor& rstd,
                                 bool training,
                                 std::array<bool, 3> output_mask);

}  // namespace bn_ext
