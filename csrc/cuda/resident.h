// Passes of one kernel: each block holds a slice on chip, so that every tensor is read once. Called by launch_forward
// and launch_backward, where the plan says so.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream);

}  // namespace bn_ext::cuda
