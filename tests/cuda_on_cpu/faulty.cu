// Kernels for the harness's own tests: correct ones, and each fault that the harness is to find. At the end the
// functions that Python calls, the pattern for other libraries.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "c_api.h"

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpThreads = 32;

float* shared_floats() { return reinterpret_cast<float*>(cuda_on_cpu_shared_memory()); }

__device__ float warp_sum(float value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Every thread gets the sum over the block. The first barrier is between writing and reading the scratch, the second
// between reading it and the next call's writing.
template <bool kFirstBarrier, bool kSecondBarrier>
__device__ float block_sum(float value) {
  float* scratch = shared_floats();
  value = warp_sum(value);
  if (threadIdx.x % kWarpThreads == 0) scratch[threadIdx.x / kWarpThreads] = value;
  if constexpr (kFirstBarrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / kWarpThreads; ++i) sum += scratch[i];
  if constexpr (kSecondBarrier) __syncthreads();
  return sum;
}

// Threads write sum(x) and sum(x * x) of their block.
template <bool kFirstBarrier, bool kSecondBarrier>
__global__ void __launch_bounds__(1024) block_sums_kernel(const float* x,  // (grid, block)
                                                          float2* sums) {  // (grid, block)
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = __ldg(x + i);
  float2 result;
  result.x = block_sum<kFirstBarrier, kSecondBarrier>(value);
  result.y = block_sum<kFirstBarrier, kSecondBarrier>(value * value);
  __stcs(sums + i, result);
}

// y[i] = x[i * stride] for i in [begin, end)
template <typename T>
__global__ void copy_kernel(const T* x, T* y, int64_t begin, int64_t end, int64_t stride) {
  const int64_t i = begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < end) __stwb(y + i, __ldcs(x + i * stride));
}

// The same without the intrinsics, so that only guard zones and AddressSanitizer see what it does.
__global__ void copy_raw_kernel(const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t i = begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < end) y[i] = x[i];
}

// Asks for x[i], then reads x[j].
__global__ void prefetch_kernel(const float* x, float* y, int64_t i, int64_t j) {
  cuda_on_cpu_prefetch(x + i);
  __stwb(y, __ldcs(x + j));
}

// Lane 0's value, the votes of odd lanes, whether any or all are odd.
__global__ void warp_kernel(uint4* results, double* shifted) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int odd = lane % 2;
  uint4 result;
  result.x = __shfl_sync(kAllLanes, threadIdx.x, 0);
  result.y = __ballot_sync(kAllLanes, odd);
  result.z = static_cast<unsigned>(__any_sync(kAllLanes, odd) + 2 * __all_sync(kAllLanes, odd));
  result.w = __shfl_xor_sync(kAllLanes, threadIdx.x, 1);
  __syncwarp();
  double value = threadIdx.x;
  if (lane < 16) value = __shfl_down_sync(0x0000ffffu, value, 1, 8);  // half a warp, in groups of eight
  __stcg(results + threadIdx.x, result);
  __stcg(shifted + threadIdx.x, value);
}

enum Fault : int {
  kNone,
  kDivergentBarrier,
  kTwoBarriers,
  kExitBeforeBarrier,
  kExitedLane,
  kLateExit,
  kAbsentLane,
  kTwoShuffles,
  kInactiveSource,
  kMisaligned,
  kSharedOverrun,
  kUnderrun,
};

// One fault each, in a block of 64 threads; block 1's thread 5 where a single one does it.
__global__ void faulty_kernel(int fault, float* y) {
  const unsigned t = threadIdx.x;
  const bool culprit = blockIdx.x == 1 && t == 5;
  if (fault == kDivergentBarrier && t < 16) __syncthreads();
  if (fault == kTwoBarriers) {
    if (culprit) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (fault == kExitBeforeBarrier && culprit) return;
  if (fault == kExitedLane && culprit) return;
  if (fault == kLateExit && culprit) {
    __syncwarp(1u << 5);
    return;
  }
  if (fault == kExitedLane || fault == kLateExit) warp_sum(1);
  if (fault == kAbsentLane && !culprit) warp_sum(1);
  if (fault == kTwoShuffles) culprit ? __shfl_sync(kAllLanes, 1, 0) : __shfl_xor_sync(kAllLanes, 1, 1);
  if (fault == kMisaligned && culprit) __ldg(reinterpret_cast<const float4*>(y + 1));
  if (fault == kSharedOverrun && culprit) shared_floats()[65] = 1;
  if (fault == kUnderrun && culprit) y[-2] = 1;
  float value = 1;
  if (fault == kInactiveSource && t < 4) value = __shfl_sync(0x0000000fu, value, 7);
  __syncthreads();  // the last
  __stcs(y + blockIdx.x * blockDim.x + t, value);
}

// Writes the first word of shared memory as it is found, then what is there after all threads have added to it.
__global__ void shared_kernel(unsigned* found, unsigned* left) {
  unsigned* words = reinterpret_cast<unsigned*>(cuda_on_cpu_shared_memory());
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  __stwb(found + i, words[threadIdx.x]);
  __syncthreads();
  words[threadIdx.x] = blockIdx.x;
  __syncthreads();
  __stwb(left + i, words[blockDim.x - 1 - threadIdx.x]);
}

// Thread i sets bit i % 32 of word i / 32: by an atomic, or by a read and a write that others come between.
template <bool kAtomic>
__global__ void set_bits_kernel(unsigned* words) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned* word = words + i / 32;
  const unsigned bit = 1u << i % 32;
  if constexpr (kAtomic) {
    atomicOr(word, bit);
  } else {
    __stcg(word, __ldcg(word) | bit);
  }
}

__global__ void overflow_kernel(const int* x, int* y) { __stwb(y, __ldg(x) + 1); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename From, typename To>
const char* converted(const From* from, To* to, int64_t count, To (*convert)(From)) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert(from[i]);
  return nullptr;
}

constexpr size_t kScratchBytes = 32 * sizeof(float);

}  // namespace

extern "C" {

const char* block_sums(const float* x, float2* sums, int64_t blocks, int64_t threads, int64_t missing_barrier) {
  return cuda_on_cpu::reported([&] {
    auto* kernel = block_sums_kernel<true, true>;
    if (missing_barrier == 1) kernel = block_sums_kernel<false, true>;
    if (missing_barrier == 2) kernel = block_sums_kernel<true, false>;
    check(launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), kScratchBytes, x, sums));
  });
}

const char* copy(const void* x, void* y, int64_t begin, int64_t end, int64_t stride, int64_t bytes, int64_t blocks) {
  return cuda_on_cpu::reported([&] {
    const auto copy_as = [&](auto type) {
      using T = decltype(type);
      check(launch(copy_kernel<T>,
                   dim3(unsigned(blocks)),
                   64,
                   0,
                   static_cast<const T*>(x),
                   static_cast<T*>(y),
                   begin,
                   end,
                   stride));
    };
    if (bytes == 2) copy_as(uint16_t{});
    if (bytes == 4) copy_as(float{});
    if (bytes == 16) copy_as(float4{});
  });
}

const char* prefetch(const float* x, float* y, int64_t i, int64_t j) {
  return cuda_on_cpu::reported([&] { check(launch(prefetch_kernel, 1, 1, 0, x, y, i, j)); });
}

const char* copy_raw(const float* x, float* y, int64_t begin, int64_t end) {
  return cuda_on_cpu::reported([&] { check(launch(copy_raw_kernel, 1, 64, 0, x, y, begin, end)); });
}

const char* warp_operations(uint4* results, double* shifted) {
  return cuda_on_cpu::reported([&] { check(launch(warp_kernel, 1, 64, 0, results, shifted)); });
}

const char* faulty(int64_t fault, float* y) {
  return cuda_on_cpu::reported([&] { check(launch(faulty_kernel, 2, 64, 64 * sizeof(float), int(fault), y)); });
}

const char* partial_warp(float2* sums, const float* x) {
  return cuda_on_cpu::reported([&] { check(launch(block_sums_kernel<true, true>, 1, 48, kScratchBytes, x, sums)); });
}

const char* shared(unsigned* found, unsigned* left, int64_t blocks) {
  return cuda_on_cpu::reported([&] { check(launch(shared_kernel, unsigned(blocks), 64, 256, found, left)); });
}

const char* set_bits(unsigned* words, int64_t blocks, int64_t atomic) {
  return cuda_on_cpu::reported(
      [&] { check(launch(atomic ? set_bits_kernel<true> : set_bits_kernel<false>, unsigned(blocks), 16, 0, words)); });
}

const char* fill(void* memory, int64_t value, int64_t bytes) {
  return cuda_on_cpu::reported([&] { check(cudaMemsetAsync(memory, int(value), size_t(bytes), nullptr)); });
}

const char* overflow(const int* x, int* y) {
  return cuda_on_cpu::reported([&] { check(launch(overflow_kernel, 1, 1, 0, x, y)); });
}

const char* load_on_host(const float* x) {
  return cuda_on_cpu::reported([&] { __ldg(x); });
}

// A launch of these sizes that would write nothing; the error that it leaves is checked as a caller would.
const char* launch_empty(int64_t gx, int64_t gy, int64_t gz, int64_t bx, int64_t by, int64_t bz, int64_t shared_bytes) {
  return cuda_on_cpu::reported([&] {
    const auto nothing = +[] {};
    const dim3 blocks = {unsigned(gx), unsigned(gy), unsigned(gz)};
    const cudaError_t error = launch(nothing, blocks, {unsigned(bx), unsigned(by), unsigned(bz)}, size_t(shared_bytes));
    if (cudaGetLastError() != error) throw std::logic_error("cudaGetLastError differs");
    if (cudaGetLastError() != cudaSuccess) throw std::logic_error("cudaGetLastError was not cleared");
    check(error);
  });
}

// Memory of CUDA's own calls, there and back.
const char* host_memory(int64_t copied_bytes, int64_t freed_times) {
  return cuda_on_cpu::reported([&] {
    const unsigned char given[64] = {1, 2, 3};
    unsigned char back[64];
    void* memory = nullptr;
    check(cudaMalloc(&memory, 32));
    check(cudaMemcpy(memory, given, size_t(copied_bytes), cudaMemcpyHostToDevice));
    check(cudaMemcpy(back, memory, size_t(copied_bytes), cudaMemcpyDeviceToHost));
    if (std::memcmp(back, given, size_t(copied_bytes)) != 0) throw std::logic_error("what came back differs");
    for (int64_t i = 0; i < freed_times; ++i) check(cudaFree(memory));
  });
}

const char* half_to_float(const __half* from, float* to, int64_t count) {
  return converted(from, to, count, __half2float);
}
const char* float_to_half(const float* from, __half* to, int64_t count) {
  return converted(from, to, count, __float2half_rn);
}
const char* bfloat16_to_float(const __nv_bfloat16* from, float* to, int64_t count) {
  return converted(from, to, count, __bfloat162float);
}
const char* float_to_bfloat16(const float* from, __nv_bfloat16* to, int64_t count) {
  return converted(from, to, count, __float2bfloat16_rn);
}

}  // extern "C"
