// The host's side of the CUDA back-end: plan, workspace, stream. The caller has set the device guard.
#include "batch_norm_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "kernels.h"

namespace bn_ext::cuda {
namespace {

// c10 alone, not ATen's CUDAContext.h: that would ask for the headers of cuBLAS, cuSPARSE and cuSOLVER.
int attribute(cudaDeviceAttr name) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, c10::cuda::current_device());
  if (error == cudaSuccess) return value;
  (void)cudaGetLastError();  // so that the next call does not find it
  TORCH_CHECK(false, "bn_ext: the CUDA device could not be asked: ", cudaGetErrorString(error));
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
  TORCH_CHECK_WITH(OutOfMemoryError,
                   error != cudaErrorMemoryAllocation,
                   "bn_ext: CUDA out of memory, so that a kernel could not be loaded, which is done at its first call: "
                   "torch.cuda.empty_cache() frees what torch holds in reserve");
  TORCH_CHECK(false, "bn_ext: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

Machine ask_machine() {
  int architecture = 0;
  check_launched(ask_compiled_for(architecture));
  const bool is_hopper_or_newer = attribute(cudaDevAttrClusterLaunch) != 0 && architecture >= 90;
  Machine machine = {attribute(cudaDevAttrMultiProcessorCount),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                     /*clusters=*/is_hopper_or_newer,
                     attribute(cudaDevAttrCooperativeLaunch) != 0,
                     /*early_starts=*/is_hopper_or_newer};
  const char* largest = std::getenv("BN_EXT_CUDA_TEAMS");
  TORCH_CHECK(largest == nullptr || limit_teams(largest, machine),
              "BN_EXT_CUDA_TEAMS must be none, block, cluster or grid, got ",
              largest);
  const char* early = std::getenv("BN_EXT_CUDA_EARLY");
  TORCH_CHECK(early == nullptr || choose_early_starts(early, machine), "BN_EXT_CUDA_EARLY must be 0 or 1, got ", early);
  return machine;
}

// The current device, which is asked once.
Machine machine() {
  static std::mutex mutex;
  static std::map<int, Machine> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const int device = c10::cuda::current_device();
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = ask_machine();
}

// From torch's caching allocator: it belongs to the current stream, and to the graph that is being captured. Counters
// first, at zero, then so many bytes of memory.
template <typename Launch>
cudaError_t with_workspace(const Plan& plan, size_t bytes, const Launch& launch) {
  const size_t counted = counter_bytes(plan);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor buffer =
      at::empty({static_cast<int64_t>(counted + bytes)}, at::TensorOptions().device(at::kCUDA).dtype(at::kByte));
  auto* begin = static_cast<unsigned char*>(buffer.data_ptr());
  if (counted > 0) {
    const cudaError_t error = cudaMemsetAsync(begin, 0, counted, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(Workspace{begin + counted, reinterpret_cast<TeamCounters*>(begin)}, stream);
}

// Launches a pass by launch(plan), and says once where CUDA has refused it in one kernel.
template <typename Params, typename Launch>
void run(const Params& p, const Launch& launch) {
  const Machine here = machine();
  Plan plan = choose_plan(p, here);
  cudaError_t refusal = cudaSuccess;
  check_launched(launch_or_do_without_teams(p, here, plan, [&](const Plan& chosen) {
    const cudaError_t error = launch(chosen);
    if (chosen.resident()) refusal = error;
    return error;
  }));
  if (refusal == cudaSuccess) return;
  TORCH_WARN_ONCE("bn_ext: CUDA refused to launch teams of blocks (",
                  cudaGetErrorString(refusal),
                  "), and kernels without them are used, which move more bytes; BN_EXT_CUDA_TEAMS=none, block or "
                  "cluster asks for smaller teams or none");
}

}  // namespace

void forward(const ForwardParams& p) {
  run(p, [&](const Plan& plan) {
    return with_workspace(plan, forward_workspace_bytes(p, plan), [&](const Workspace& workspace, cudaStream_t stream) {
      return launch_forward(p, plan, workspace, stream);
    });
  });
}

void backward(const BackwardParams& p) {
  run(p, [&](const Plan& plan) {
    return with_workspace(
        plan, backward_workspace_bytes(p, plan), [&](const Workspace& workspace, cudaStream_t stream) {
          return launch_backward(p, plan, workspace, stream);
        });
  });
}

}  // namespace bn_ext::cuda
