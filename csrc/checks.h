// Every error that a user can cause. If torch raises for the same mistake, exception type and text are torch's.
#pragma once

#include "arguments.h"

namespace bn_ext {

// Checks the arguments before anything is written. Also works with symbolic sizes.
void check_arguments(const BatchNormArguments& args);

// Throws if a running statistic requires a gradient, because it has none.
void check_not_differentiable(const OptionalTensor& tensor, const char* name);

// Throws if num_batches_tracked cannot be incremented in place.
void check_can_be_raised(const OptionalTensor& count);

// Throws if the tensor was created in inference mode, so that autograd cannot save it.
void check_can_be_saved(const OptionalTensor& tensor, const char* name);

// Throws if the residual differs from input in shape, device or dtype.
void check_residual(const at::Tensor& input, const OptionalTensor& residual);

// Throws if mask_format is given for an activation without a mask, or if input cannot have this memory format.
void check_mask(const BatchNormArguments& args, OptionalFormat mask_format);

// Throws if no forward pass of `input` can have returned `saved`.
void check_saved(const at::Tensor& input, const at::Tensor& saved);

// Checks the arguments of batch_norm_backward.
void check_backward(const at::Tensor& dy,
                    const at::Tensor& input,
                    const OptionalTensor& weight,
                    const at::Tensor& saved,
                    const OptionalTensor& residual,
                    const OptionalTensor& mask,
                    OptionalFormat mask_format);

}  // namespace bn_ext
