// The host's side of CUDA that a whole program needs besides launches: memory, streams, events, graphs, attributes.
// Everything has run when a function returns; so events count up, and a graph holds nothing: what is captured has run.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "cuda_on_cpu.h"

inline const char* cudaGetErrorName(cudaError_t) { return "an error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
inline bool spoils_copies = false;  // by a wrong byte in the middle
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  const cudaError_t error = cudaMemcpy(to, from, bytes, kind);
  if (spoils_copies) static_cast<unsigned char*>(to)[bytes / 2] ^= 1;
  return error;
}

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

using cudaEvent_t = int*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new int();
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  static int ticks = 0;
  *event = ++ticks;
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = static_cast<float>(*end - *begin);
  return cudaSuccess;
}

using cudaGraph_t = int*;
using cudaGraphExec_t = int*;
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaSuccess; }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// Attributes that change nothing here.
enum IgnoredAttribute {
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
template <typename... K>
cudaError_t cudaFuncSetAttribute(void (*)(K...), IgnoredAttribute, int) {
  return cudaSuccess;
}

// What the device says of itself: a small Hopper.
struct cudaDeviceProp {
  char name[32] = "a simulated device";
  int l2CacheSize = 1 << 20;
  std::size_t totalGlobalMem = std::size_t(1) << 30;
  std::size_t sharedMemPerBlockOptin = 227 << 10;
  int regsPerMultiprocessor = 65536;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

enum ToldAttribute {
  cudaDevAttrComputeCapabilityMajor = 9,
  cudaDevAttrComputeCapabilityMinor = 0,
  cudaDevAttrReservedSharedMemoryPerBlock = 1 << 10,
  cudaDevAttrClockRate = 1000000,
  cudaDevAttrMemoryClockRate = 1000001,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, ToldAttribute attribute, int) {
  *value = attribute;
  return cudaSuccess;
}

// Of one multiprocessor.
inline long long clock64() {
  static long long cycles = 0;
  return cycles += 1 << 20;
}
inline unsigned atomicSub(unsigned* address, unsigned value) { return atomicAdd(address, 0u - value); }
inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned old = *address;
  return old < value ? atomicAdd(address, value - old) : old;
}
