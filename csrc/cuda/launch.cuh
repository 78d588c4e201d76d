// The platform, as kernels see it: how they are launched, and where shared memory comes from.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <set>
#include <utility>

#include "launched_before.h"

namespace bn_ext::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; there is no other kind.
template <typename T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#else  // tests/cuda_on_cpu: every resident block has its own
  return reinterpret_cast<T*>(cuda_on_cpu_shared_memory());
#endif
}

// The dynamic shared memory from byte `begin` on.
template <typename T>
__device__ T* shared_memory_at(size_t begin) {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + begin);
}

constexpr size_t kUnaskedSharedBytes = 48 * 1024;

// Waits for the previous kernel on the stream, which may still be ending. A kernel that is launched with PDL must call
// this before it accesses global memory.
inline __device__ void pdl_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The configuration of a launch. Only grid.x is used, because it may be 2^31 - 1; y and z may be at most 65535.
struct Grid {
  int64_t blocks;
  int threads;  // per block
  size_t shared_bytes = 0;
  int cluster_blocks = 1;
  bool cooperative = false;
  bool uses_pdl = false;
};

// Whether kernels can use PDL in CUDA graphs too: both the toolkit and the driver must be CUDA 12.3 or newer.
inline bool graphs_use_pdl() {
  thread_local const bool they_do = [] {
    constexpr int kFirst = 12030;
    int driver = 0;
    return CUDART_VERSION >= kFirst && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kFirst;
  }();
  return they_do;
}

// CUDA's form of a Grid. It is not copyable, because it points to its own attributes.
class LaunchConfig {
 public:
  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config_.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config_.dynamicSmemBytes = grid.shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (grid.cluster_blocks > 1) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster_blocks), 1, 1};
    }
    if (grid.cooperative) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (grid.uses_pdl && (graphs_use_pdl() || !is_captured(stream))) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  static bool is_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
    (void)cudaGetLastError();  // so that no later check reports it
    return true;
  }

  cudaLaunchAttribute attributes_[3] = {};
  cudaLaunchConfig_t config_ = {};
};

// Calls ask(device) for the current device unless it has succeeded for this kernel before, which `asked` records.
using KernelsOfDevices = std::set<std::pair<int, const void*>>;
template <typename Kernel, typename Ask>
cudaError_t ask_once(KernelsOfDevices& asked, Kernel* kernel, const Ask& ask) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::pair<int, const void*> key = {device, reinterpret_cast<const void*>(kernel)};
  if (error != cudaSuccess || asked.count(key) > 0) return error;
  error = ask(device);
  if (error == cudaSuccess) asked.insert(key);
  return error;
}

// Lets a kernel use more than 48 KiB of shared memory: as much as the device has, which is valid for the launches of
// all threads. A thread sets the attribute once, because setting it may wait for copies in progress.
template <typename Kernel>
cudaError_t ask_for_shared_memory(Kernel* kernel) {
  thread_local KernelsOfDevices asked;
  return ask_once(asked, kernel, [&](int device) {
    int bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    // Otherwise a multiprocessor may have a smaller carve-out, in which fewer than kResidentAtATime blocks fit.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  });
}

// Loads a kernel's code, which CUDA otherwise does at its first launch. Loading takes device memory and fails if none
// is available. A thread loads a kernel once.
template <typename Kernel>
cudaError_t load(Kernel* kernel) {
  thread_local KernelsOfDevices loaded;
  return ask_once(loaded, kernel, [&](int) {
    cudaFuncAttributes attributes = {};
    return cudaFuncGetAttributes(&attributes, kernel);
  });
}

// Launches a kernel. All launches go through this function.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, Arguments&&... arguments) {
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > kUnaskedSharedBytes && !LaunchedBefore::holds()) {
    const cudaError_t error = ask_for_shared_memory(kernel);
    if (error != cudaSuccess) return error;
  }
  const LaunchConfig config(grid, stream);
  return cudaLaunchKernelEx(config.get(), kernel, std::forward<Arguments>(arguments)...);
}

// Whether a cluster, or all blocks of a cooperative grid, can be resident at the same time.
template <typename... Parameters>
cudaError_t ask_whether_fits(void (*kernel)(Parameters...), const Grid& grid, bool& fits) {
  cudaError_t error = grid.shared_bytes > kUnaskedSharedBytes ? ask_for_shared_memory(kernel) : cudaSuccess;
  if (error != cudaSuccess) return error;
  if (grid.cluster_blocks > 1) {
    int clusters = 0;
    const LaunchConfig config({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster_blocks}, nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get());
    fits = clusters > 0;
    return error;
  }
  int device = 0, multiprocessors = 0, blocks = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, grid.threads, grid.shared_bytes);
  }
  fits = int64_t(blocks) * multiprocessors >= grid.blocks;
  return error;
}

}  // namespace bn_ext::cuda
