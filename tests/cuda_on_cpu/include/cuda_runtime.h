// Stands in for CUDA's header of this name where g++ compiles a kernel's source: keywords, device code, the launch.
//
// What is not here does not compile: static __shared__ memory (one object for all resident blocks) and <<<>>>.
// Streams have no meaning: a launch has run when it returns.
#pragma once

#include <algorithm>
#include <cmath>
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

cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(void*), void* arguments);

}  // namespace cuda_on_cpu

// Runs the kernel to its end. A fault comes out as cuda_on_cpu::Fault, a launch that a device refuses as an error.
template <typename... K, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(K...), A&&... arguments) {
  static_assert((std::is_trivially_copyable_v<K> && ...), "kernel arguments are copied as bytes");
  const std::tuple<K...> values(std::forward<A>(arguments)...);
  auto thread = [kernel, &values] { std::apply(kernel, values); };  // each thread has copies of its own
  return cuda_on_cpu::launch(*config, [](void* body) { (*static_cast<decltype(thread)*>(body))(); }, &thread);
}
