// The random words that the kernels here move, alike on host and device, and how their results are checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace device_limits {

// A bijection of 32-bit numbers (lowbias32, Chris Wellons 2018).
__host__ __device__ inline unsigned hash_of(unsigned i) {
  i ^= i >> 16;
  i *= 0x7feb352du;
  i ^= i >> 15;
  i *= 0x846ca68bu;
  return i ^ i >> 16;
}

// The i-th 16 bytes of all memory that is read here: no two are alike.
__host__ __device__ inline uint4 random_vector(int64_t i) {
  const unsigned hash = hash_of(static_cast<unsigned>(i) + 1);
  return {hash, hash * 0x9e3779b1u, hash * 0x85ebca77u, hash * 0xc2b2ae3du};
}

// Sums of words are modulo 2^32, so their order does not matter.
__host__ __device__ inline unsigned sum_of(const uint4& v) { return v.x + v.y + v.z + v.w; }
__host__ __device__ inline uint4 operator+(const uint4& a, const uint4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__host__ __device__ inline bool operator==(const uint4& a, const uint4& b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

__device__ inline int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// y[i] = random_vector(i). Any grid; neighbours in it have neighbouring vectors. Writes 16 bytes per vector.
__global__ void fill_kernel(uint4* y, int64_t vectors) {
  for (int64_t i = global_thread(); i < vectors; i += int64_t(gridDim.x) * blockDim.x) __stwb(y + i, random_vector(i));
}

// What y[i] is to be: random_vector(i), the one `second` further on added where second > 0, and to every word the key
// of its slice of so many vectors where there are keys.
struct Expected {
  int64_t second = 0;
  const unsigned* keys = nullptr;  // (vectors / slice_vectors,)
  int64_t slice_vectors = 1;
};

// Adds to *wrong how many vectors of y are not as expected. Any grid; reads 16 bytes per vector, and keys.
__global__ void count_wrong_kernel(const uint4* y, int64_t vectors, Expected expected, unsigned* wrong) {
  unsigned found = 0;
  for (int64_t i = global_thread(); i < vectors; i += int64_t(gridDim.x) * blockDim.x) {
    uint4 right = random_vector(i);
    if (expected.second > 0) right = right + random_vector(i + expected.second);
    if (expected.keys != nullptr) {
      const unsigned key = __ldg(expected.keys + i / expected.slice_vectors);
      right = right + uint4{key, key, key, key};
    }
    found += !(__ldcs(y + i) == right);
  }
  if (found > 0) atomicAdd(wrong, found);
}

}  // namespace device_limits
