// Zeros on the device for the counters of a grid's teams, which a kernel finds as zeros and leaves as zeros, so that no
// launch clears them. Includes no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace bn_ext::cuda {

// Memory that all passes of a stream share, which run one after another: made and cleared at its first use, and kept as
// long as the process lives. Null if there is none left. `device` is the current one.
// Not for a stream that is captured, because its graph may run beside the stream's later passes; nor for
// cudaStreamPerThread, which is another stream in each thread.
inline void* zeros_of_stream(size_t bytes, int device, cudaStream_t stream) {
  struct Zeros {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  constexpr size_t kLeastBytes = size_t{1} << 16;  // enough for every grid of today's devices
  static std::mutex mutex;
  static auto& all = *new std::map<std::pair<int, cudaStream_t>, Zeros>;  // never destroyed, as threads may outlive it
  const std::lock_guard<std::mutex> lock(mutex);
  Zeros& zeros = all[{device, stream}];
  if (bytes <= zeros.bytes) return zeros.memory;
  const size_t wanted = std::max({bytes, kLeastBytes, 2 * zeros.bytes});
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // or another thread's capture would forbid cudaMalloc
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  cudaError_t error = cudaMalloc(&memory, wanted);
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, wanted, stream);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // so that no one else finds it
    if (memory != nullptr) (void)cudaFree(memory);
    return nullptr;
  }
  zeros = {memory, wanted};  // a smaller one may be in use, so it is not freed
  return memory;
}

}  // namespace bn_ext::cuda
