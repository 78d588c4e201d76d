// Selects the kernels of a pass by its path, single-pass or multi-kernel, and by its type.
#include "kernels.h"
#include "launches.h"
#include "merge.cuh"

namespace bn_ext::cuda {
namespace {

// Calls body(T{}) with the type T of `dtype`.
template <typename Body>
cudaError_t with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

template <template <typename> class Kernels, typename Params>
cudaError_t launch(const Params& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto value) { return Kernels<decltype(value)>::launch(p, plan, workspace, stream); });
}

// Whether the teams of a plan fit on the device at the same time; false if CUDA reports an error.
template <template <typename> class Kernels, typename Params>
bool fits(const Params& p, const Plan& plan) {
  bool yes = false;
  const auto ask = [&](auto value) { return Kernels<decltype(value)>::ask_whether_fits(p, plan, yes); };
  if (with_type(p.dtype, ask) == cudaSuccess) return yes;
  (void)cudaGetLastError();  // so that no later check reports it
  return false;
}

}  // namespace

cudaError_t ask_compiled_for(int& architecture) { return MultiKernelForward<float>::ask_compiled_for(architecture); }

Plan choose_plan(const ForwardParams& p, const Machine& machine) {
  const Plan plan = plan_forward(p, machine);
  return plan.blocks_wait() && !fits<SinglePassForward>(p, plan) ? plan_forward(p, machine.without_teams()) : plan;
}

Plan choose_plan(const BackwardParams& p, const Machine& machine) {
  const Plan plan = plan_backward(p, machine);
  return plan.blocks_wait() && !fits<SinglePassBackward>(p, plan) ? plan_backward(p, machine.without_teams()) : plan;
}

size_t forward_workspace_bytes(const ForwardParams& p, const Plan& plan) {
  if (plan.single_pass()) return workspace_of_teams(plan);
  return p.training && !p.recompute ? plan.channels * plan.segments * sizeof(Moments) : 0;
}

size_t backward_workspace_bytes(const BackwardParams& p, const Plan& plan) {
  if (plan.single_pass()) return workspace_of_teams(plan);
  return p.needs_sums() ? plan.channels * (plan.segments * sizeof(GradSums) + 2 * sizeof(double)) : 0;
}

cudaError_t launch_forward(const ForwardParams& params,
                           const Plan& plan,
                           const Workspace& workspace,
                           cudaStream_t stream) {
  ForwardParams p = params;
  if (p.recompute) p.mask = nullptr;
  if (p.mask != nullptr && !plan.whole_bytes) {
    const cudaError_t error = cudaMemsetAsync(p.mask, 0, mask_bytes(p.shape.numel()), stream);
    if (error != cudaSuccess) return error;
  }
  return plan.single_pass() ? launch<SinglePassForward>(p, plan, workspace, stream)
                            : launch<MultiKernelForward>(p, plan, workspace, stream);
}

cudaError_t launch_backward(const BackwardParams& p,
                            const Plan& plan,
                            const Workspace& workspace,
                            cudaStream_t stream) {
  return plan.single_pass() ? launch<SinglePassBackward>(p, plan, workspace, stream)
                            : launch<MultiKernelBackward>(p, plan, workspace, stream);
}

}  // namespace bn_ext::cuda
