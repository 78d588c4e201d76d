// The host side of the CUDA back-end: plan, workspace, stream. The caller has set the device guard.
#include "batch_norm_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "counters.h"
#include "kernels.h"
#include "plan_cache.h"

namespace bn_ext::cuda {
namespace {

// Only c10 headers: ATen's CUDAContext.h would require the headers of cuBLAS, cuSPARSE and cuSOLVER.
int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  if (error == cudaSuccess) return value;
  (void)cudaGetLastError();  // so that no later check reports it
  TORCH_CHECK(false, "bn_ext cannot query an attribute of the CUDA device: ", cudaGetErrorString(error));
}

void check_launched(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that no later check reports it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    TORCH_CHECK(false,
                "bn_ext has no kernels for this GPU's compute capability ",
                major,
                ".",
                minor,
                ": rebuild it with TORCH_CUDA_ARCH_LIST=",
                major,
                ".",
                minor);
  }
  TORCH_CHECK_WITH(OutOfMemoryError,
                   error != cudaErrorMemoryAllocation,
                   "bn_ext: CUDA out of memory while loading a kernel before its first launch; "
                   "torch.cuda.empty_cache() frees the memory that torch caches");
  TORCH_CHECK(false, "bn_ext cannot launch a CUDA kernel: ", cudaGetErrorString(error));
}

Machine ask_machine(int device) {
  int architecture = 0;
  check_launched(ask_compiled_for(architecture), device);
  const bool is_hopper_or_newer = attribute(cudaDevAttrClusterLaunch, device) != 0 && architecture >= 90;
  Machine machine = {attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                     /*clusters=*/is_hopper_or_newer,
                     attribute(cudaDevAttrCooperativeLaunch, device) != 0,
                     /*pdl=*/is_hopper_or_newer};
  const char* largest = std::getenv("BN_EXT_CUDA_TEAMS");
  TORCH_CHECK(largest == nullptr || limit_teams(largest, machine),
              "BN_EXT_CUDA_TEAMS must be none, block, cluster or grid, got ",
              largest);
  const char* pdl = std::getenv("BN_EXT_CUDA_PDL");
  TORCH_CHECK(pdl == nullptr || choose_pdl(pdl, machine), "BN_EXT_CUDA_PDL must be 0 or 1, got ", pdl);
  const char* tuning = std::getenv("BN_EXT_CUDA_TUNING");
  TORCH_CHECK(tuning == nullptr || tune(tuning, machine),
              "BN_EXT_CUDA_TUNING must be comma-separated settings such as stagger=0,prefetch=0.5 (stagger, "
              "evict_last, keep_results and three_kernels: 0 or 1; half_chip: 0, 1 or always; prefetch: 0, 0.25, 0.5, "
              "0.75 or 1), got ",
              tuning);
  return machine;
}

// The machine of a device, which must be the current one. It is queried once.
Machine machine_of(int device) {
  static std::mutex mutex;
  static std::map<int, Machine> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = ask_machine(device);
}

// Memory from torch's caching allocator, which belongs to the current stream or to the graph that is being captured.
// Most passes need none, and then no tensor is allocated.
class PassMemory {
 public:
  explicit PassMemory(size_t bytes) {
    if (bytes == 0) return;
    memory_ = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().device(at::kCUDA).dtype(at::kByte));
  }
  void* data() const { return memory_.defined() ? memory_.data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

// Zeros for the counters of a grid's teams: the memory that all passes of the stream share, or memory of this pass
// alone, which is cleared before the kernel, and in a graph before each replay of it.
class Counters {
 public:
  Counters(size_t bytes, int device, cudaStream_t stream) {
    if (bytes == 0) return;
    if (may_share(stream)) memory_ = zeros_of_stream(bytes, device, stream);
    if (memory_ != nullptr) return;
    own_ = PassMemory(bytes);
    memory_ = own_.data();
    C10_CUDA_CHECK(cudaMemsetAsync(memory_, 0, bytes, stream));
  }
  TeamCounters* data() const { return static_cast<TeamCounters*>(memory_); }

 private:
  static bool may_share(cudaStream_t stream) {
    const bool is_captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    return !is_captured && stream != cudaStreamPerThread;
  }

  PassMemory own_{0};
  void* memory_ = nullptr;
};

// Launches a pass. Warns once if CUDA refuses to launch it with teams.
template <typename Params>
void run(const Params& p,
         int device,
         size_t (*bytes_of)(const Params&, const Plan&),
         cudaError_t (*launch)(const Params&, const Plan&, const Workspace&, cudaStream_t)) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device));
  Plan plan;
  cudaError_t refusal = cudaSuccess;
  const cudaError_t error = launch_by_known_plan(p, machine_of(device), device, plan, [&](const Plan& chosen) {
    const PassMemory memory(bytes_of(p, chosen));
    const Counters counters(counter_bytes(chosen), device, stream);
    const cudaError_t launched = launch(p, chosen, {memory.data(), counters.data()}, stream);
    if (chosen.single_pass()) refusal = launched;
    return launched;
  });
  check_launched(error, device);
  if (refusal == cudaSuccess) return;
  TORCH_WARN_ONCE(
      "bn_ext: CUDA refused to launch teams of blocks (",
      cudaGetErrorString(refusal),
      "), so the pass takes the multi-kernel path, which moves more bytes; BN_EXT_CUDA_TEAMS=none, block or "
      "cluster avoids this with smaller teams or none");
}

}  // namespace

void forward(const ForwardParams& p, int device) { run(p, device, forward_workspace_bytes, launch_forward); }

void backward(const BackwardParams& p, int device) { run(p, device, backward_workspace_bytes, launch_backward); }

}  // namespace bn_ext::cuda
