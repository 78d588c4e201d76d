// Launches of the kernels for activation tensors of one type T. Each file of instantiations/ compiles one of these
// structs for one T, so that a build can compile them in parallel; no other file includes the headers that define them.
// kernels.cu selects one of them; kernels.h describes workspaces and errors.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// The multi-kernel path: up to three kernels.
template <typename T>
struct MultiKernelForward {
  static cudaError_t launch(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
  static cudaError_t ask_compiled_for(int& architecture);
};
template <typename T>
struct MultiKernelBackward {
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
};

// The single-pass path: one kernel. Each team keeps a slice on chip and reads every tensor once; spilled rows are read
// twice.
template <typename T>
struct SinglePassForward {
  static cudaError_t launch(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
  static cudaError_t ask_whether_fits(const ForwardParams& p, const Plan& plan, bool& fits);
};
template <typename T>
struct SinglePassBackward {
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
  static cudaError_t ask_whether_fits(const BackwardParams& p, const Plan& plan, bool& fits);
};

}  // namespace bn_ext::cuda
