// Numbers in memory and in registers, and accesses to global memory: several adjacent values at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "../params.h"

namespace bn_ext::cuda {

// The type that values are computed in, and that mean, rstd and coefficients have.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccumulateType<T>::type;

inline __device__ float to_accumulate(float value) { return value; }
inline __device__ double to_accumulate(double value) { return value; }
inline __device__ float to_accumulate(__half value) { return __half2float(value); }
inline __device__ float to_accumulate(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_accumulate(acc_t<T> value) {
  return value;
}
template <>
inline __device__ __half from_accumulate<__half>(float value) {
  return __float2half_rn(value);
}
template <>
inline __device__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// What the memory instructions move.
template <int kBytes>
struct AccessType;
template <>
struct AccessType<1> {
  using type = unsigned char;
};
template <>
struct AccessType<2> {
  using type = unsigned short;
};
template <>
struct AccessType<4> {
  using type = unsigned int;
};
template <>
struct AccessType<8> {
  using type = uint2;
};
template <>
struct AccessType<16> {
  using type = uint4;
};

// kCount adjacent values, read and written in one access; their address is a multiple of their size.
template <typename T, int kCount>
struct Vector {
  using Access = typename AccessType<sizeof(T) * kCount>::type;
  T values[kCount];

  __device__ acc_t<T> operator[](int i) const { return to_accumulate(values[i]); }
  __device__ void set(int i, acc_t<T> value) { values[i] = from_accumulate<T>(value); }

  static __device__ Vector of(Access bits) {
    Vector vector;
    memcpy(&vector, &bits, sizeof(bits));
    return vector;
  }
  __device__ Access bits() const {
    Access bits;
    memcpy(&bits, this, sizeof(bits));
    return bits;
  }
};

template <int kCount, typename T>
__device__ Vector<T, kCount> load(const T* p) {
  using V = Vector<T, kCount>;
  return V::of(__ldg(reinterpret_cast<const typename V::Access*>(p)));
}

// For values that no later kernel of this pass reads: they are the first to leave the cache.
template <int kCount, typename T>
__device__ Vector<T, kCount> load_last(const T* p) {
  using V = Vector<T, kCount>;
  return V::of(__ldcs(reinterpret_cast<const typename V::Access*>(p)));
}

template <int kCount, typename T>
__device__ void store(T* p, const Vector<T, kCount>& vector) {
  __stwb(reinterpret_cast<typename Vector<T, kCount>::Access*>(p), vector.bits());
}

// For results that no later kernel of this pass reads.
template <int kCount, typename T>
__device__ void store_last(T* p, const Vector<T, kCount>& vector) {
  __stcs(reinterpret_cast<typename Vector<T, kCount>::Access*>(p), vector.bits());
}

// A single value, which this kernel may write too.
template <typename T>
__device__ T load_one(const T* p) {
  using V = Vector<T, 1>;
  return V::of(__ldca(reinterpret_cast<const typename V::Access*>(p))).values[0];
}
template <typename T>
__device__ void store_one(T* p, T value) {
  __stwb(reinterpret_cast<typename AccessType<sizeof(T)>::type*>(p), Vector<T, 1>{{value}}.bits());
}

// Two doubles for a later kernel, at an address that is a multiple of 16.
inline __device__ void store_pair(double* p, double first, double second) {
  using V = Vector<double, 2>;
  __stwb(reinterpret_cast<V::Access*>(p), V{{first, second}}.bits());
}

// What blocks that run at the same time write for each other: past the caches that they do not share. Structs of
// numbers of one size.
template <typename T>
using PeerWord = typename AccessType<sizeof(T) % 16 == 0  ? 16
                                     : sizeof(T) % 8 == 0 ? 8
                                                          : 4>::type;
template <typename T>
__device__ T load_of_peer(const T* p) {
  using Word = PeerWord<T>;
  Word words[sizeof(T) / sizeof(Word)];
  const Word* from = reinterpret_cast<const Word*>(p);
#pragma unroll
  for (Word& word : words) word = __ldcg(from++);
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}
template <typename T>
__device__ void store_for_peers(T* p, const T& value) {
  using Word = PeerWord<T>;
  Word words[sizeof(T) / sizeof(Word)];
  memcpy(words, &value, sizeof(T));
  Word* to = reinterpret_cast<Word*>(p);
#pragma unroll
  for (const Word& word : words) __stcg(to++, word);
}

// p[i] of a (C,) vector of any type; `otherwise` if there is none.
template <typename A>
__device__ A read_param(const void* p, DType dtype, int64_t i, A otherwise) {
  if (p == nullptr) return otherwise;
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(load_one(static_cast<const float*>(p) + i));
    case DType::kFloat64:
      return static_cast<A>(load_one(static_cast<const double*>(p) + i));
    case DType::kFloat16:
      return to_accumulate(load_one(static_cast<const __half*>(p) + i));
    case DType::kBFloat16:
      return to_accumulate(load_one(static_cast<const __nv_bfloat16*>(p) + i));
  }
  return otherwise;
}

inline __device__ void write_param(void* p, DType dtype, int64_t i, double value) {
  if (p == nullptr) return;
  switch (dtype) {
    case DType::kFloat32:
      store_one(static_cast<float*>(p) + i, static_cast<float>(value));
      break;
    case DType::kFloat64:
      store_one(static_cast<double*>(p) + i, value);
      break;
    case DType::kFloat16:
      store_one(static_cast<__half*>(p) + i, __float2half_rn(static_cast<float>(value)));
      break;
    case DType::kBFloat16:
      store_one(static_cast<__nv_bfloat16*>(p) + i, __float2bfloat16_rn(static_cast<float>(value)));
      break;
  }
}

}  // namespace bn_ext::cuda
