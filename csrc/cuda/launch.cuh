// The platform, as kernels see it: how they are launched, and where shared memory comes from.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace bn_ext::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; there is no other kind.
template <typename T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#else  // tests/cuda_on_cpu, where every resident block has its own
  return reinterpret_cast<T*>(cuda_on_cpu_shared_memory());
#endif
}

// What lies so many bytes further on.
template <typename T>
__device__ T* shared_memory_at(size_t begin) {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + begin);
}

constexpr size_t kUnaskedSharedBytes = 48 * 1024;

// A kernel that is to have more must be told so: as much as there is, since what is told holds for all threads'
// launches.
template <typename Kernel>
cudaError_t ask_for_shared_memory(Kernel* kernel) {
  int device = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// The one way to launch. Only grid.x is used: it may be 2^31 - 1, y and z no more than 65535.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...),
                   int64_t blocks,
                   int threads,
                   size_t shared_bytes,
                   cudaStream_t stream,
                   Arguments&&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kUnaskedSharedBytes) {
    const cudaError_t error = ask_for_shared_memory(kernel);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace bn_ext::cuda
