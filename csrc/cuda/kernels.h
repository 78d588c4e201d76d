// The kernels' interface for the host: launches on a stream, without torch. Nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// Returns the compute capability that the loaded kernels were compiled for, such as 90 for 9.0. A newer device may run
// code for an older one, which has neither clusters nor PDL.
cudaError_t ask_compiled_for(int& architecture);

// Like plan_forward and plan_backward, but the plan has no teams if CUDA reports that they do not fit on the device.
Plan choose_plan(const ForwardParams& p, const Machine& machine);
Plan choose_plan(const BackwardParams& p, const Machine& machine);

// The size of Workspace::memory.
size_t forward_workspace_bytes(const ForwardParams& p, const Plan& plan);
size_t backward_workspace_bytes(const BackwardParams& p, const Plan& plan);

// Return CUDA's error if it refuses to load or to launch a kernel; cudaGetLastError() returns it too. Errors that can
// be found before the first launch are returned before it.
cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);

// Calls launch(plan), which allocates a workspace and launches a pass. If CUDA refuses a plan with teams, although it
// reported that they fit, sets `plan` to one for the multi-kernel path and calls launch again. It does so for every
// error: one that is not due to teams occurs on the multi-kernel path too.
template <typename Params, typename Launch>
cudaError_t launch_or_do_without_teams(const Params& p, const Machine& machine, Plan& plan, const Launch& launch) {
  const cudaError_t error = launch(plan);
  if (error == cudaSuccess || !plan.single_pass()) return error;
  (void)cudaGetLastError();  // so that no later check reports it
  plan = choose_plan(p, machine.without_teams());
  return launch(plan);
}

}  // namespace bn_ext::cuda
