// What the kernels offer to the host: launches on a stream, without torch. Nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// What the kernels that are loaded on this device were compiled for: 90 for compute capability 9.0. A newer device may
// run code of an older one, which has no clusters and starts no kernels early.
cudaError_t ask_compiled_for(int& architecture);

// As plan_forward and plan_backward, but for teams that this device, as it is now, cannot have at a time.
Plan choose_plan(const ForwardParams& p, const Machine& machine);
Plan choose_plan(const BackwardParams& p, const Machine& machine);

// Of Workspace's memory.
size_t forward_workspace_bytes(const ForwardParams& p, const Plan& plan);
size_t backward_workspace_bytes(const BackwardParams& p, const Plan& plan);

// An error is CUDA's refusal to load or to launch a kernel, which is cudaGetLastError()'s too. What can be known before
// the first launch comes before it.
cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);

// Calls launch(plan), which makes a workspace and launches a pass. If CUDA refuses the plan's teams, though it said
// that it has room for them, calls it again with a plan for the multi-kernel path, which `plan` then is. Whatever the
// error was: where it is not of the teams, the multi-kernel path meets it too.
template <typename Params, typename Launch>
cudaError_t launch_or_do_without_teams(const Params& p, const Machine& machine, Plan& plan, const Launch& launch) {
  const cudaError_t error = launch(plan);
  if (error == cudaSuccess || !plan.single_pass()) return error;
  (void)cudaGetLastError();  // so that no one else finds it
  plan = choose_plan(p, machine.without_teams());
  return launch(plan);
}

}  // namespace bn_ext::cuda
