// Numbers in memory and in registers, and accesses to global memory, which move several adjacent values at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "plan.h"

namespace bn_ext::cuda {

// The type of computations and of mean, rstd and coefficients for activation tensors of T.
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

// relu, which passes NaN on.
inline __device__ double clipped(double value) { return value <= 0 ? 0 : value; }
inline __device__ float clipped(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
  return value;
#else
  return value <= 0 ? 0 : value;
#endif
}

// Rounds two values to 16 bits, with relu if kClips; one instruction on sm_80 and newer.
template <typename T, bool kClips>
__device__ unsigned round_pair(float first, float second) {
  unsigned pair = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kClips && std::is_same_v<T, __half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
  } else if constexpr (kClips) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
  }
#endif
  if constexpr (kClips) return round_pair<T, false>(clipped(first), clipped(second));
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 halves = __floats2half2_rn(first, second);
    memcpy(&pair, &halves, sizeof(pair));
  } else {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(first, second);
    memcpy(&pair, &halves, sizeof(pair));
  }
  return pair;
}

// The type that a memory instruction of kBytes bytes moves.
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

// kCount adjacent values, read and written in one access; the address is a multiple of their total size. They are
// stored as words, because the compiler needs a register per 16-bit value when it selects between two vectors of
// values.
template <typename T, int kCount>
struct Vector {
  using Access = typename AccessType<sizeof(T) * kCount>::type;
  Access words;

  static __device__ Vector of(const T (&values)[kCount]) {
    Vector vector;
    memcpy(&vector.words, values, sizeof(values));
    return vector;
  }
  // kClips: applies relu.
  template <bool kClips = false>
  static __device__ Vector rounded(const acc_t<T> (&from)[kCount]) {
    T values[kCount];
    if constexpr (sizeof(T) == 2 && kCount > 1) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const unsigned pair = round_pair<T, kClips>(from[i], from[i + 1]);
        memcpy(values + i, &pair, sizeof(pair));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = from_accumulate<T>(kClips ? clipped(from[i]) : from[i]);
    }
    return of(values);
  }

  __device__ T value(int i) const { return part<T>(i); }
  __device__ acc_t<T> operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount > 1) {
      // A bfloat16 is the upper half of a float: one instruction on the word that two of them share.
      const unsigned pair = part<unsigned>(i / 2);
      return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      return to_accumulate(value(i));
    }
  }

 private:
  template <typename Part>
  __device__ Part part(int i) const {
    Part part;
    memcpy(&part, reinterpret_cast<const char*>(&words) + i * sizeof(Part), sizeof(Part));
    return part;
  }
};

template <int kCount, typename T>
__device__ Vector<T, kCount> load(const T* p) {
  using V = Vector<T, kCount>;
  return {__ldg(reinterpret_cast<const typename V::Access*>(p))};
}

// Evict-first, for values that no later kernel of this pass reads.
template <int kCount, typename T>
__device__ Vector<T, kCount> load_last(const T* p) {
  using V = Vector<T, kCount>;
  return {__ldcs(reinterpret_cast<const typename V::Access*>(p))};
}

template <int kCount, typename T>
__device__ void store(T* p, const Vector<T, kCount>& vector) {
  __stwb(reinterpret_cast<typename Vector<T, kCount>::Access*>(p), vector.words);
}

// Streaming store, for values that no later kernel of this pass reads.
template <int kCount, typename T>
__device__ void store_last(T* p, const Vector<T, kCount>& vector) {
  __stcs(reinterpret_cast<typename Vector<T, kCount>::Access*>(p), vector.words);
}

// For results, with the plan's result_policy; narrow accesses are always evict-first. The policy comes from a uniform
// register, so it costs no instruction. No kernel reads a result that it has written.
template <int kCount, typename T>
__device__ void store_result(T* p, const Vector<T, kCount>& vector, uint64_t policy) {
  constexpr size_t kBytes = sizeof(vector.words);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    uint4 words;
    memcpy(&words, &vector.words, kBytes);
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p),
                 "r"(words.x),
                 "r"(words.y),
                 "r"(words.z),
                 "r"(words.w),
                 "l"(policy));
  } else if constexpr (kBytes == 8) {
    uint64_t word;
    memcpy(&word, &vector.words, kBytes);
    asm volatile("st.global.L2::cache_hint.b64 [%0], %1, %2;" ::"l"(p), "l"(word), "l"(policy));
  } else {
    store_last(p, vector);
  }
#else
  kBytes >= 8 && policy != kEvictFirst ? store(p, vector) : store_last(p, vector);
#endif
}

// Prefetches a value to the L2 cache; the thread does not wait.
inline __device__ void prefetch(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  cuda_on_cpu_prefetch(p);
#endif
}

// A single value that this kernel may also write, so the load does not use the read-only cache.
template <typename T>
__device__ T load_one(const T* p) {
  using V = Vector<T, 1>;
  return V{__ldca(reinterpret_cast<const typename V::Access*>(p))}.value(0);
}
template <typename T>
__device__ void store_one(T* p, T value) {
  __stwb(reinterpret_cast<typename AccessType<sizeof(T)>::type*>(p), Vector<T, 1>::of({value}).words);
}

// Stores two doubles for a later kernel. The address must be a multiple of 16.
inline __device__ void store_pair(double* p, double first, double second) {
  using V = Vector<double, 2>;
  __stwb(reinterpret_cast<V::Access*>(p), V::of({first, second}).words);
}

// Accesses to values that concurrent blocks exchange: through the L2 cache, past the L1 caches, which are not coherent.
// T is a struct of numbers of one size.
template <typename T>
using PeerWord = typename AccessType<sizeof(T) % 16 == 0  ? 16
                                     : sizeof(T) % 8 == 0 ? 8
                                                          : 4>::type;
template <typename T>
__device__ T load_through_l2(const T* p) {
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
__device__ void store_through_l2(T* p, const T& value) {
  using Word = PeerWord<T>;
  Word words[sizeof(T) / sizeof(Word)];
  memcpy(words, &value, sizeof(T));
  Word* to = reinterpret_cast<Word*>(p);
#pragma unroll
  for (const Word& word : words) __stcg(to++, word);
}

// Calls body(T{}) with the parameters' type T.
template <typename Body>
__device__ void with_param_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

// Loads a[i] and b[i] of (C,) vectors of type `dtype`. If a vector is null, its value stays as it is. Both loads are
// issued before either result is used.
template <typename A>
__device__ void read_params(const void* a, const void* b, DType dtype, int64_t i, A& a_value, A& b_value) {
  with_param_type(dtype, [&](auto type) {
    using T = decltype(type);
    T of_a{}, of_b{};
    if (a != nullptr) of_a = load_one(static_cast<const T*>(a) + i);
    if (b != nullptr) of_b = load_one(static_cast<const T*>(b) + i);
    if (a != nullptr) a_value = static_cast<A>(to_accumulate(of_a));
    if (b != nullptr) b_value = static_cast<A>(to_accumulate(of_b));
  });
}

// Stores p[i] of a (C,) vector of type `dtype`, unless p is null.
inline __device__ void write_param(void* p, DType dtype, int64_t i, double value) {
  if (p == nullptr) return;
  with_param_type(dtype, [&](auto type) {
    using T = decltype(type);
    store_one(static_cast<T*>(p) + i, from_accumulate<T>(static_cast<acc_t<T>>(value)));
  });
}

}  // namespace bn_ext::cuda
