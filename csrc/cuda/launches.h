// Launches of the kernels of one type T of activations. Each file of instantiations/ compiles one of these for one T,
// so that a build's processors share the work; nothing else includes the headers that define them. kernels.cu chooses
// among them, and kernels.h says what workspaces and errors are.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// Three kernels, or those of them that are needed.
template <typename T>
struct GeneralForward {
  static cudaError_t launch(const ForwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);
  static cudaError_t ask_compiled_for(int& architecture);
};
template <typename T>
struct GeneralBackward {
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);
};

// One kernel: each team of blocks holds a slice on chip, so that every tensor is read once, but for what does not fit.
template <typename T>
struct ResidentForward {
  static cudaError_t launch(const ForwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);
  static cudaError_t ask_whether_fits(const ForwardParams& p, const Plan& plan, bool& fits);
};
template <typename T>
struct ResidentBackward {
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream);
  static cudaError_t ask_whether_fits(const BackwardParams& p, const Plan& plan, bool& fits);
};

}  // namespace bn_ext::cuda
