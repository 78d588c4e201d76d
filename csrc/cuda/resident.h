// Passes of one kernel: each team of blocks holds a slice on chip, so that every tensor is read once, but for what does
// not fit. Called by launch_forward and launch_backward, where the plan says so.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// Whether the device has room for a plan's teams at a time; not where it does not say.
bool fits(const ForwardParams& p, const Plan& plan);
bool fits(const BackwardParams& p, const Plan& plan);

// The workspace is of workspace_of_teams(plan) bytes, aligned to 16; its contents do not matter.
cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);

}  // namespace bn_ext::cuda
