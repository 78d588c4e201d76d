// Autograd around the inner operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "batch_norm.h"
#include "checks.h"

namespace bn_ext {

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The forward pass of the mode that `args` asks for; see batch_norm.h.
ThreeTensors dispatch_forward(const BatchNormArguments& args, OptionalFormat mask_format);

// Whether backward needs what is before the activation, u + z, and so bias and residual: not where a mask tells all.
bool saves_u(const BatchNormArguments& args);

// y, with its backward pass.
TensorAndSaved differentiable_batch_norm(const BatchNormArguments& args);

}  // namespace bn_ext
