// Launches of the kernels of one type T of activations. Each file of instantiations/ compiles one of these for one T,
// so that a build's processors share the work; no other file includes the headers that define them. kernels.cu chooses
// among them; kernels.h describes workspaces and errors.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// Up to three kernels: those that the pass needs.
template <typename T>
struct MultiKernelForward {
  static cudaError_t launch(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
  static cudaError_t ask_compiled_for(int& architecture);
};
template <typename T>
struct MultiKernelBackward {
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream);
};

// One kernel: each team of blocks keeps a slice on chip and reads every tensor once. Rows that do not fit are read
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
