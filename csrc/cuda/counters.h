// Device memory for the counters of a grid's teams. They are zero before and after each kernel, so no launch has to
// clear them. Includes no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace bn_ext::cuda {

// Returns memory that all passes of a stream share, because they run one after another. It is allocated and cleared at
// its first use and never freed. Returns null if no memory is available. `device` must be the current device.
// Do not use it for a stream that is being captured, because the graph may run beside later passes of the stream, nor
// for cudaStreamPerThread, which is a different stream in each thread.
inline void* zeros_of_stream(size_t bytes, int device, cudaStream_t stream) {
  struct Zeros {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  constexpr size_t kLeastBytes = size_t{1} << 16;  // enough for every grid of current devices
  static std::mutex mutex;
  static auto& all =
      *new std::map<std::pair<int, cudaStream_t>, Zeros>;  // never destroyed, because threads may outlive it
  const std::lock_guard<std::mutex> lock(mutex);
  Zeros& zeros = all[{device, stream}];
  if (bytes <= zeros.bytes) return zeros.memory;
  const size_t wanted = std::max({bytes, kLeastBytes, 2 * zeros.bytes});
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // otherwise another thread's capture forbids cudaMalloc
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  cudaError_t error = cudaMalloc(&memory, wanted);
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, wanted, stream);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // so that no later check reports it
    if (memory != nullptr) (void)cudaFree(memory);
    return nullptr;
  }
  zeros = {memory, wanted};  // the smaller memory may be in use, so it is not freed
  return memory;
}

}  // namespace bn_ext::cuda
