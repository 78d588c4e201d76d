// Batch normalisation composed from ATen's operators: slower, but differentiable in every way torch knows.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "batch_norm.h"
#include "checks.h"

namespace bn_ext {

// Whether forward-mode AD carries a tangent with it.
bool has_forward_gradient(const OptionalTensor& tensor);

// For what the fused operators cannot see through: torch.func transforms, forward-mode AD, devices other than CPU and
// CUDA.
bool needs_composed(const BatchNormArguments& args);
at::Tensor composed_batch_norm(const BatchNormArguments& args);

// An activation, differentiable to any order.
at::Tensor composed_activation(const at::Tensor& u, const Activation& activation);

// What a backward pass knows of its forward pass: undefined where there is none, or it is not needed.
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

// The backward pass in differentiable operators, for create_graph=True: derivatives of any order follow from it.
// Statistics are computed from input again, so that they are differentiated too; eval's are the saved ones.
FourTensors composed_backward(const at::Tensor& dy, const SavedForBackward& saved, std::array<bool, 4> output_mask);

}  // namespace bn_ext
