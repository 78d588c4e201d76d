// The host's side of the CUDA back-end: plan, workspace, stream. The caller has set the device guard.
#include "batch_norm_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "kernels.h"

namespace bn_ext::cuda {
namespace {

// c10 alone, not ATen's CUDAContext.h: that would ask for the headers of cuBLAS, cuSPARSE and cuSOLVER.
int attribute(cudaDeviceAttr name) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, c10::cuda::current_device());
  TORCH_CHECK(error == cudaSuccess, "bn_ext: the CUDA device could not be asked: ", cudaGetErrorString(error));
  return value;
}

Machine machine() {
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrClusterLaunch) != 0,
          attribute(cudaDevAttrCooperativeLaunch) != 0};
}

// From torch's caching allocator: it belongs to the current stream, and to the graph that is being captured.
at::Tensor workspace(size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().device(at::kCUDA).dtype(at::kByte));
}

void check_launched(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next call does not find it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor);
    TORCH_CHECK(false,
                "bn_ext has no kernels for this GPU's compute capability ",
                major,
                ".",
                minor,
                ": build it again with TORCH_CUDA_ARCH_LIST=",
                major,
                ".",
                minor);
  }
  TORCH_CHECK(false, "bn_ext: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace

void forward(const ForwardParams& p) {
  Plan plan;
  check_launched(choose_plan(p, machine(), plan));
  const at::Tensor memory = workspace(forward_workspace_bytes(p, plan));
  check_launched(launch_forward(p, plan, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

void backward(const BackwardParams& p) {
  Plan plan;
  check_launched(choose_plan(p, machine(), plan));
  const at::Tensor memory = workspace(backward_workspace_bytes(p, plan));
  check_launched(launch_backward(p, plan, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace bn_ext::cuda
