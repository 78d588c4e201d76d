// Kernels of blocks that work together, for the harness's own tests: in clusters, in cooperative grids, and with
// asynchronous copies; correct, and with a fault each.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "c_api.h"

namespace {

constexpr unsigned kThreads = 64;

unsigned* shared_words() { return reinterpret_cast<unsigned*>(cuda_on_cpu_shared_memory()); }

enum Fault : int {
  kNone,
  kNoBarrierBefore,  // a peer's sum is read
  kNoBarrierAfter,   // a peer's sum is overwritten
  kOneHalf,          // arrives twice
  kOtherHalf,        // waits only
  kNoSuchBlock,
  kStays,       // one thread goes to another barrier
  kTwoBuffers,  // no fault: no barrier after, but the next sums are stored beside those that are still read
  kCount,
};

__device__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();  // in cluster_barrier
}

// sums[round, block] = sum over the blocks of a cluster of x[round, block]. Each block's number goes through its shared
// memory.
__global__ void cluster_sums_kernel(const unsigned* x, unsigned* sums, int rounds, int fault) {
  unsigned* own = shared_words();
  const bool culprit = blockIdx.x == 1 && threadIdx.x == 5;
  for (int round = 0; round < rounds; ++round) {
    const unsigned i = round * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) *own = __ldg(x + i);
    if (fault == kOneHalf && culprit) __cluster_barrier_arrive();
    if (fault == kOtherHalf && culprit) __cluster_barrier_wait();
    if (fault == kStays && culprit) __syncthreads();
    if (fault != kNoBarrierBefore) cluster_barrier();
    unsigned sum = 0;
    const unsigned blocks = __clusterSizeInBlocks() + (fault == kNoSuchBlock);
    for (unsigned rank = 0; rank < blocks; ++rank) {
      sum += *static_cast<unsigned*>(__cluster_map_shared_rank(own, rank));
    }
    if (fault != kNoBarrierAfter) cluster_barrier();
    if (threadIdx.x == __clusterRelativeBlockRank()) __stwb(sums + i, sum);
  }
}

// Half of the threads leave early, half of those after they have arrived: the others' barriers open all the same.
__global__ void leaving_kernel(unsigned* y) {
  if (threadIdx.x % 4 == 1) return;
  __cluster_barrier_arrive();
  if (threadIdx.x % 4 == 3) return;
  __cluster_barrier_wait();
  cluster_barrier();
  __stwb(y + blockIdx.x * kThreads + threadIdx.x, 1u);
}

// Opens when all blocks of the grid have come: the top bit of the counter changes, the others are as before.
__device__ void grid_barrier(unsigned* counter) {
  constexpr unsigned kTop = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned old = atomicAdd(counter, blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1);
    while (((__ldcg(counter) ^ old) & kTop) == 0) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// sums[round, block] = sum over all blocks of x[round, block], through global memory: exchange, (2, blocks).
__global__ void grid_sums_kernel(
    const unsigned* x, unsigned* exchange, unsigned* counter, unsigned* sums, int rounds, int fault) {
  for (int round = 0; round < rounds; ++round) {
    const unsigned i = round * gridDim.x + blockIdx.x;
    unsigned* left = exchange + (fault == kTwoBuffers && round % 2 == 1 ? gridDim.x : 0);
    if (threadIdx.x == 0) __stcg(left + blockIdx.x, __ldg(x + i));
    if (fault != kNoBarrierBefore) grid_barrier(counter);
    unsigned sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += __ldcg(left + block);
    if (fault != kNoBarrierAfter && fault != kTwoBuffers) grid_barrier(counter);
    if (threadIdx.x == 0) __stwb(sums + i, sum);
  }
}

// y = x by way of shared memory, in two groups of copies. waits: 0 none, 1 for the first one only, 2 for both.
__global__ void copies_kernel(const float* x, float* y, int waits, int bytes, int to) {
  float* own = reinterpret_cast<float*>(cuda_on_cpu_shared_memory());
  const unsigned t = threadIdx.x;
  for (unsigned i = t; i < 2 * kThreads; i += kThreads) {
    __pipeline_memcpy_async(own + i + to, x + i, bytes);
    __pipeline_commit();
  }
  if (waits > 0) __pipeline_wait_prior(1);
  const float first = own[t];
  if (waits > 1) __pipeline_wait_prior(0);
  __stwb(y + t, first);
  __stwb(y + kThreads + t, own[kThreads + t]);
}

// Thread 0 of block 0 waits for two words, read one after the other; the others set them. For `others` less than two it
// waits for ever, polling by an atomic that changes nothing.
__global__ void words_kernel(unsigned* words, unsigned* y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x > 0) {
    __stcg(words + blockIdx.x - 1, 1u);
    return;
  }
  while (__ldcg(words) + __ldcg(words + 1) + atomicOr(words + 2, 0) < 2) __nanosleep(20);  // for two words
  __stwb(y, 1u);
}

// Launched to start early.
__global__ void early_kernel(const float* x, float* y, bool waits) {
  if (waits) cudaGridDependencySynchronize();
  __stwb(y + threadIdx.x, __ldg(x + threadIdx.x));  // in early_kernel
}

// Waits for the grid, whatever its launch says; one thread may stay away.
__global__ void whole_grid_kernel(unsigned* y, bool all) {
  if (all || threadIdx.x != 3) cooperative_groups::this_grid().sync();  // in whole_grid_kernel
  __stwb(y + blockIdx.x * kThreads + threadIdx.x, 1u);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t cluster, bool cooperative, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = 2 * kThreads * sizeof(float);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

void empty_kernel() {}

}  // namespace

extern "C" {

const char* cluster_sums(
    const unsigned* x, unsigned* sums, int64_t blocks, int64_t cluster, int64_t rounds, int64_t fault) {
  return cuda_on_cpu::reported(
      [&] { launch(cluster_sums_kernel, blocks, cluster, false, x, sums, int(rounds), int(fault)); });
}

const char* leaving(unsigned* y, int64_t blocks, int64_t cluster) {
  return cuda_on_cpu::reported([&] { launch(leaving_kernel, blocks, cluster, false, y); });
}

const char* grid_sums(const unsigned* x,
                      unsigned* exchange,
                      unsigned* counter,
                      unsigned* sums,
                      int64_t blocks,
                      int64_t rounds,
                      int64_t fault,
                      int64_t cooperative) {
  return cuda_on_cpu::reported([&] {
    launch(grid_sums_kernel, blocks, 1, cooperative != 0, x, exchange, counter, sums, int(rounds), int(fault));
  });
}

const char* words(unsigned* words, unsigned* y, int64_t others) {
  return cuda_on_cpu::reported([&] { launch(words_kernel, 1 + others, 1, true, words, y); });
}

const char* copies(const float* x, float* y, int64_t waits, int64_t bytes, int64_t to) {
  return cuda_on_cpu::reported([&] { launch(copies_kernel, 1, 1, false, x, y, int(waits), int(bytes), int(to)); });
}

const char* early(const float* x, float* y, int64_t waits) {
  return cuda_on_cpu::reported([&] {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = 1;
    config.blockDim = kThreads;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, early_kernel, x, y, waits != 0));
  });
}

const char* whole_grid(unsigned* y, int64_t blocks, int64_t cooperative, int64_t all) {
  return cuda_on_cpu::reported([&] { launch(whole_grid_kernel, blocks, 1, cooperative != 0, y, all != 0); });
}

// How many clusters of so many blocks there is room for.
const char* occupancy_of_clusters(int64_t cluster, int64_t* clusters) {
  return cuda_on_cpu::reported([&] {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = unsigned(cluster);
    config.blockDim = kThreads;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int found = -1;
    check(cudaOccupancyMaxActiveClusters(&found, empty_kernel, &config));
    *clusters = found;
  });
}

// A launch with so much shared memory, of a kernel that has asked for so much or has not asked (0).
const char* launch_shared(int64_t asked, int64_t shared_bytes) {
  return cuda_on_cpu::reported([&] {
    if (asked > 0) check(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(asked)));
    cudaLaunchConfig_t config = {};
    config.dynamicSmemBytes = size_t(shared_bytes);
    check(cudaLaunchKernelEx(&config, empty_kernel));
  });
}

const char* occupancy(int64_t threads, int64_t shared_bytes, int64_t* blocks) {
  return cuda_on_cpu::reported([&] {
    int found = -1;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, empty_kernel, int(threads), size_t(shared_bytes)));
    *blocks = found;
  });
}

}  // extern "C"
