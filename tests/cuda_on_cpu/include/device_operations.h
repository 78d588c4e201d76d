// What a kernel can do besides arithmetic: barriers, warp operations, clusters, loads and stores of global memory,
// atomics, waits.
//
// Each function takes the place it is called from as a last, defaulted argument, so that a fault can name a line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_types.h"

constexpr int warpSize = 32;

// Those of the thread that runs: the scheduler writes them at each switch.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// The dynamic shared memory of the current block, 256-byte aligned; 0xff in every byte when the block starts.
unsigned char* cuda_on_cpu_shared_memory();

namespace cuda_on_cpu {

struct Place {
  const char* file;
  int line;
};

#define CUDA_ON_CPU_PLACE ::cuda_on_cpu::Place place = {__builtin_FILE(), __builtin_LINE()}

enum class Operation { shuffle, shuffle_xor, shuffle_down, ballot, sync };

struct WarpRequest {
  Operation operation;
  unsigned mask;
  std::uint64_t value;  // sent to the other lanes
  int argument;         // source lane, lane mask or distance
  int width;
};

enum class Direction { read, write };

void barrier(Place place);
unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive(Place place);
void cluster_wait(Place place);
void grid_barrier(Place place);
void wait_for_earlier_launches();
void* cluster_shared(const void* address, unsigned rank, Place place);
void sleep(Place place);
std::uint64_t warp_operation(const WarpRequest& request, Place place);
void check_access(Direction direction, const void* address, std::size_t bytes, Place place);
void check_prefetch(const void* address, Place place);
// A wait has left copies of so many bytes on their way.
void count_awaited_later(std::size_t bytes);
// A store has asked for so many bytes to leave the cache first.
void count_streamed(std::size_t bytes);
void note_write();  // after each write to global memory: it may be what a sleeping thread waits for

template <typename T>
T shuffle(Operation operation, unsigned mask, T value, int argument, int width, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what CUDA can shuffle");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation({operation, mask, bits, argument, width}, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate, Place place) {
  return static_cast<unsigned>(warp_operation({Operation::ballot, mask, predicate, 0, warpSize}, place));
}

template <typename T>
constexpr bool kIsWord = std::is_trivially_copyable_v<T> && sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0;

template <typename T>
T load(const T* address, Place place) {
  static_assert(kIsWord<T>, "one access moves 1, 2, 4, 8 or 16 bytes");
  check_access(Direction::read, address, sizeof(T), place);
  T value;
  std::memcpy(static_cast<void*>(&value), static_cast<const void*>(address), sizeof(T));
  return value;
}

template <typename T>
void store(T* address, const T& value, Place place) {
  static_assert(kIsWord<T>, "one access moves 1, 2, 4, 8 or 16 bytes");
  check_access(Direction::write, address, sizeof(T), place);
  std::memcpy(static_cast<void*>(address), static_cast<const void*>(&value), sizeof(T));
  note_write();
}

// One read and one write, with nothing between them.
template <typename Change>
unsigned atomic(unsigned* address, const Change& change, Place place) {
  check_access(Direction::read, address, sizeof(unsigned), place);
  check_access(Direction::write, address, sizeof(unsigned), place);
  const unsigned old = *address;
  *address = change(old);
  if (*address != old) note_write();
  return old;
}

template <typename T>
struct Same {
  using Type = T;
};

}  // namespace cuda_on_cpu

// Barriers and warp operations.

inline void __syncthreads(CUDA_ON_CPU_PLACE) { cuda_on_cpu::barrier(place); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::warp_operation({cuda_on_cpu::Operation::sync, mask, 0, 0, warpSize}, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::Operation::shuffle, mask, value, lane, width, place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::Operation::shuffle_xor, mask, value, lane_mask, width, place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle(
      cuda_on_cpu::Operation::shuffle_down, mask, value, static_cast<int>(distance), width, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, place);
}

inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot(mask, predicate == 0, place) == 0;
}

// Clusters of blocks. A barrier has two halves; threads that have exited are not waited for.

inline unsigned __clusterRelativeBlockRank() { return cuda_on_cpu::cluster_rank(); }
inline unsigned __clusterSizeInBlocks() { return cuda_on_cpu::cluster_blocks(); }
inline void __cluster_barrier_arrive(CUDA_ON_CPU_PLACE) { cuda_on_cpu::cluster_arrive(place); }
inline void __cluster_barrier_arrive_relaxed(CUDA_ON_CPU_PLACE) { cuda_on_cpu::cluster_arrive(place); }
inline void __cluster_barrier_wait(CUDA_ON_CPU_PLACE) { cuda_on_cpu::cluster_wait(place); }
// Where the cluster's block of this rank has what is at this address of one's own shared memory.
inline void* __cluster_map_shared_rank(const void* address, unsigned rank, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::cluster_shared(address, rank, place);
}

// In a launch that may start before the one before it has ended.
inline void cudaGridDependencySynchronize() { cuda_on_cpu::wait_for_earlier_launches(); }

// In a loop that waits for another block: lets others go first. Memory is in order here, so a fence does nothing.
inline void __nanosleep(unsigned, CUDA_ON_CPU_PLACE) { cuda_on_cpu::sleep(place); }
inline void __threadfence() {}

inline float __uint_as_float(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

// Global memory. Caches have no meaning here: all loads are alike, and all stores but for one counter.

#define CUDA_ON_CPU_LOAD(name)                  \
  template <typename T>                         \
  T name(const T* address, CUDA_ON_CPU_PLACE) { \
    return cuda_on_cpu::load(address, place);   \
  }
#define CUDA_ON_CPU_STORE(name)                                                         \
  template <typename T>                                                                 \
  void name(T* address, typename cuda_on_cpu::Same<T>::Type value, CUDA_ON_CPU_PLACE) { \
    cuda_on_cpu::store(address, value, place);                                          \
  }

CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)

template <typename T>
void __stcs(T* address, typename cuda_on_cpu::Same<T>::Type value, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::store(address, value, place);
  cuda_on_cpu::count_streamed(sizeof(T));
}

// In place of an instruction that has no function in CUDA.
inline void cuda_on_cpu_prefetch(const void* address, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::check_prefetch(address, place);
}

inline unsigned atomicOr(unsigned* address, unsigned value, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::atomic(address, [=](unsigned old) { return old | value; }, place);
}
inline unsigned atomicAdd(unsigned* address, unsigned value, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::atomic(address, [=](unsigned old) { return old + value; }, place);
}

#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE
#undef CUDA_ON_CPU_PLACE
