// Calls of the operators, through the dispatcher or past it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "batch_norm.h"
#include "composed.h"

namespace bn_ext {

// The forward pass in the mode of `args`; see batch_norm.h.
ThreeTensors dispatch_forward(const BatchNormArguments& args, OptionalFormat mask_format);

// Its backward pass.
FourTensors dispatch_backward(const at::Tensor& dy, const SavedForBackward& saved, std::array<bool, 4> output_mask);

// The public operator.
at::Tensor dispatch_batch_norm(const BatchNormArguments& args);

}  // namespace bn_ext
