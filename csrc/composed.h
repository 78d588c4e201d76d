// Batch normalisation composed of ATen's operators: slower, but differentiable in every way that torch supports.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "batch_norm.h"
#include "checks.h"

namespace bn_ext {

// Whether the tensor carries a tangent of forward-mode AD.
bool has_forward_gradient(const OptionalTensor& tensor);

// Whether the fused operators cannot compute the call: torch.func transforms, forward-mode AD, devices other than CPU
// and CUDA, and layouts other than strided.
bool needs_composed(const BatchNormArguments& args);
at::Tensor composed_batch_norm(const BatchNormArguments& args);

// Computes an activation, differentiable to any order.
at::Tensor composed_activation(const at::Tensor& u, const Activation& activation);

// What a forward pass saves for its backward pass. Tensors that are absent or not needed are undefined.
struct SavedForBackward {
  at::Tensor input;
  at::Tensor weight;
  at::Tensor bias;
  at::Tensor residual;
  at::Tensor saved;  // see batch_norm.h
  at::Tensor mask;
  OptionalFormat mask_format;
  bool training;
  double eps;
  NamedActivation activation;
};

// The backward pass in differentiable operators, for create_graph=True and derivatives of any order. In training it
// computes the statistics from input again, so that they are differentiated too. In eval it uses the saved ones.
FourTensors composed_backward(const at::Tensor& dy, const SavedForBackward& saved, std::array<bool, 4> output_mask);

}  // namespace bn_ext
