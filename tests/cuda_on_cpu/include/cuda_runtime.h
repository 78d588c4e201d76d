// Stands in for CUDA's header of this name where g++ compiles a kernel's source: keywords, device code, the launch.
//
// What is not here does not compile: static __shared__ memory (one object for all resident blocks) and <<<>>>.
// Streams have no meaning: a launch has run when it returns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "device_operations.h"

// Overloads that CUDA has in the global namespace.
using std::erfc;
using std::exp;
using std::expm1;
using std::fma;
using std::isfinite;
using std::max;
using std::min;
using std::tanh;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_on_cpu {

// `function` is the kernel, whose attributes hold; body(arguments) calls it.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void (*body)(void*), void* arguments);
cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t load();
cudaError_t most_clusters(int* clusters, const void* function, const cudaLaunchConfig_t& config);
cudaError_t blocks_per_multiprocessor(int* blocks, const void* function, int threads, std::size_t shared_bytes);

}  // namespace cuda_on_cpu

// A __device__ variable is one of the host's.
template <typename T>
cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, std::size_t bytes) {
  std::memcpy(to, &symbol, bytes);
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMemcpyToSymbol(const T& symbol, const void* from, std::size_t bytes) {
  std::memcpy(const_cast<T*>(&symbol), from, bytes);
  return cudaSuccess;
}

// Runs the kernel to its end. A fault comes out as cuda_on_cpu::Fault, a launch that a device refuses as an error.
template <typename... K, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(K...), A&&... arguments) {
  static_assert((std::is_trivially_copyable_v<K> && ...), "kernel arguments are copied as bytes");
  const std::tuple<K...> values(std::forward<A>(arguments)...);
  auto thread = [kernel, &values] { std::apply(kernel, values); };  // each thread has copies of its own
  const auto body = [](void* arguments) { (*static_cast<decltype(thread)*>(arguments))(); };
  return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel), body, &thread);
}

// More than 48 KiB of shared memory are for those kernels that have asked for it, once for the library's life.
template <typename... K>
cudaError_t cudaFuncSetAttribute(void (*kernel)(K...), cudaFuncAttribute attribute, int value) {
  return cuda_on_cpu::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename... K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(K...)) {
  attributes->ptxVersion = 90;
  return cuda_on_cpu::load();
}

// How many blocks a multiprocessor of the machine has room for.
template <typename... K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          void (*kernel)(K...),
                                                          int threads,
                                                          std::size_t shared_bytes) {
  return cuda_on_cpu::blocks_per_multiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

// How many clusters of this launch the machine has room for.
template <typename... K>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(K...), const cudaLaunchConfig_t* config) {
  return cuda_on_cpu::most_clusters(clusters, reinterpret_cast<const void*>(kernel), *config);
}
