// Every error a user can cause, in one place: torch's exception type and torch's words where torch raises.
#pragma once

#include "arguments.h"

namespace bn_ext {

// Throws before anything is written. Works on symbolic sizes too.
void check_arguments(const BatchNormArguments& args);

// Throws for a running statistic that requires a gradient: there is none.
void check_not_differentiable(const OptionalTensor& tensor, const char* name);

// Throws for a num_batches_tracked that cannot be changed in place.
void check_can_be_raised(const OptionalTensor& count);

// Throws for a tensor made in inference mode where autograd would have to save it.
void check_can_be_saved(const OptionalTensor& tensor, const char* name);

// Throws for a residual unlike input.
void check_residual(const at::Tensor& input, const OptionalTensor& residual);

// Throws where a mask is asked for that this activation does not have, or in an order that input cannot have.
void check_mask(const BatchNormArguments& args, OptionalFormat mask_format);

// Throws for what no forward pass of `input` saved.
void check_saved(const at::Tensor& input, const at::Tensor& saved);

// The arguments of batch_norm_backward.
void check_backward(const at::Tensor& dy,
                    const at::Tensor& input,
                    const OptionalTensor& weight,
                    const at::Tensor& saved,
                    const OptionalTensor& residual,
                    const OptionalTensor& mask,
                    OptionalFormat mask_format);

}  // namespace bn_ext
