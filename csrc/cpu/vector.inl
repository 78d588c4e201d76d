// Vectors of kVectorBytes bytes, by GCC's and Clang's vector extensions: one source for all instruction sets. isa/*.inl
// include it inside the namespace of their instruction set.

#define BN_EXT_INLINE inline __attribute__((always_inline))
#define BN_EXT_LAMBDA __attribute__((always_inline))  // otherwise vectors would pass through memory

template <typename A>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorTypes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorTypes<A>::V;
template <typename A>
using Mask = typename VectorTypes<A>::I;  // all bits or none, per lane
template <typename A>
constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A));

typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));

// ---- the active lanes of a vector ----

struct AllLanes {};
// All lanes, which fill a part of a cache line that is streamed.
struct StreamedLanes {};
// The lanes [first, last) at either end of a run. The memory of the other lanes may be read, and also rewritten with
// the same values unless `is_shared` is set: then it may belong to a streamed line. If a run is shorter than a vector
// (`is_short`), only the first `last` elements exist in memory.
struct EndLanes {
  int64_t first;
  int64_t last;
  bool is_short;
  bool is_shared;
};

template <typename A>
BN_EXT_INLINE Mask<A> lane_index() {
  Mask<A> index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return index;
}
// Sets inactive lanes to zero. The operation is bitwise, so an inf or NaN there does not matter.
template <typename A>
BN_EXT_INLINE Vec<A> keep(Vec<A> v, AllLanes) {
  return v;
}
template <typename A>
BN_EXT_INLINE Vec<A> keep(Vec<A> v, const EndLanes& lanes) {
  const Mask<A> index = lane_index<A>();
  return (Vec<A>)((Mask<A>)v & (index >= int(lanes.first)) & (index < int(lanes.last)));
}

// ---- memory <-> vector ----

template <typename V, typename P>
BN_EXT_INLINE V load_bits(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));  // any alignment
  return v;
}

BN_EXT_INLINE Vec<float> load_vector(const float* p) { return load_bits<Vec<float>>(p); }
BN_EXT_INLINE Vec<double> load_vector(const double* p) { return load_bits<Vec<double>>(p); }
BN_EXT_INLINE void store_vector(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
BN_EXT_INLINE void store_vector(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }

// 16-bit floats by the processor's instructions. isa/*.inl define the macros, because g++ does not define __AVX2__ and
// similar macros after a target pragma.
#if defined(BN_EXT_AVX512)
BN_EXT_INLINE Vec<float> load_vector(const BFloat16* p) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
BN_EXT_INLINE void store_vector(BFloat16* p, Vec<float> v) {
  // Replaces a NaN by one whose upper half does not change by rounding.
  const __m512i bits = (__m512i)_mm512_fixupimm_ps((__m512)v, (__m512)v, _mm512_set1_epi32(0x33), 0);
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i result = _mm512_mask_add_epi32(half, is_odd, half, _mm512_set1_epi32(1));
  // Packs the upper halves, words 1, 3, 5 ... A permutation uses the permutation port once, a narrowing twice.
  const __m512i odd_words = (__m512i)(lane_index<float>() * 0x40004 + 0x30001);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words, result)));
}
BN_EXT_INLINE Vec<float> load_vector(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
BN_EXT_INLINE void store_vector(Half* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(BN_EXT_AVX2)
BN_EXT_INLINE Vec<float> load_vector(const BFloat16* p) {
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
BN_EXT_INLINE void store_vector(BFloat16* p, Vec<float> v) {
  const __m256i bits = (__m256i)v;
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), is_odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
BN_EXT_INLINE Vec<float> load_vector(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
BN_EXT_INLINE void store_vector(Half* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// bfloat16: the upper half of a float, rounded to nearest even; a NaN stays a NaN.
BN_EXT_INLINE Vec<float> load_vector(const BFloat16* p) {
  return (Vec<float>)(__builtin_convertvector(load_bits<U16>(p), U32) << 16);
}
BN_EXT_INLINE void store_vector(BFloat16* p, Vec<float> v) {
  const U32 bits = (U32)v;
  const U32 nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 is_nan = (U32)(v != v);
  const U32 rounded = (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & nearest_even);
  const U16 out = __builtin_convertvector(rounded, U16);
  __builtin_memcpy(p, &out, sizeof(out));
}
// float16 by integer arithmetic. The exponent and mantissa of a float16, shifted to their positions in a float, mean
// 2^-112 times the value. A multiplication corrects this, also for subnormals. Exponent 31 (inf, NaN) must become 255.
BN_EXT_INLINE Vec<float> load_vector(const Half* p) {
  const U32 bits = __builtin_convertvector(load_bits<U16>(p), U32);
  const U32 magnitude = bits & 0x7fff;
  const Vec<float> finite = (Vec<float>)(magnitude << 13) * 0x1p112f;
  const U32 is_special = (U32)(magnitude >= 0x7c00);
  const U32 special = (magnitude << 13) | 0x7f800000;
  return (Vec<float>)(((bits & 0x8000) << 16) | (is_special & special) | (~is_special & (U32)finite));
}
// A float addition that shifts the surplus bits out of the mantissa rounds to nearest even. The addend's exponent is 13
// more than that of the value or, if the result is subnormal, than that of the smallest normal float16.
BN_EXT_INLINE void store_vector(Half* p, Vec<float> v) {
  const U32 bits = (U32)v;
  const U32 magnitude = bits & 0x7fffffff;
  const U32 exponent = magnitude & 0x7f800000;
  const U32 smallest = (U32)(exponent < 0x38800000);
  const U32 anchor = (smallest & (0x38800000 + (13u << 23))) | (~smallest & (exponent + (13u << 23)));
  const U32 too_large = (U32)(magnitude >= 0x477ff000);  // rounds to 65536 or more: inf
  const Vec<float> safe = (Vec<float>)(magnitude & ~too_large);
  const U32 safe_anchor = anchor & ~too_large;
  const U32 mantissa = (U32)(safe + (Vec<float>)safe_anchor) - safe_anchor;  // in units of float16's last place
  const U32 base = ~smallest & ((exponent - 0x38000000) >> 13);              // exponent, at its float16 position
  const U32 finite = base + (mantissa - (~smallest & 0x400));
  const U32 is_nan = (U32)(magnitude > 0x7f800000);
  const U32 special = 0x7c00 | (is_nan & (0x200 | (magnitude >> 13 & 0x3ff)));
  const U32 result = ((bits >> 16) & 0x8000) | (too_large & special) | (~too_large & finite);
  const U16 out = __builtin_convertvector(result, U16);
  __builtin_memcpy(p, &out, sizeof(out));
}
#endif

// Copies `count` values, fewer than 2 * kHalf.
template <int64_t kHalf, typename T>
BN_EXT_INLINE void copy_some(T* to, const T* from, int64_t count) {
  const int64_t copied = count & kHalf;
  if (copied) __builtin_memcpy(to, from, kHalf * sizeof(T));
  if constexpr (kHalf > 1) copy_some<kHalf / 2>(to + copied, from + copied, count);
}

// Loads the first `last` lanes. Stores the lanes [first, last).
template <typename T>
static __attribute__((noinline)) Vec<acc_t<T>> load_first(const T* p, int64_t last) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  T buffer[L] = {};
  copy_some<L / 2>(buffer, p, last);
  return load_vector(buffer);
}
template <typename T>
static __attribute__((noinline)) void store_some(T* p, Vec<acc_t<T>> v, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  T buffer[L];
  store_vector(buffer, v);
  copy_some<L>(p + first, buffer + first, last - first);
}

template <typename T, typename Lanes>
BN_EXT_INLINE Vec<acc_t<T>> load(const T* p, const Lanes&) {
  return load_vector(p);
}
template <typename T>
BN_EXT_INLINE Vec<acc_t<T>> load(const T* p, const EndLanes& lanes) {
  return lanes.is_short ? load_first(p, lanes.last) : load_vector(p);
}
template <typename T>
BN_EXT_INLINE void store(T* p, Vec<acc_t<T>> v, AllLanes) {
  store_vector(p, v);
}
template <typename T>
BN_EXT_INLINE void store(T* p, Vec<acc_t<T>> v, const EndLanes& lanes) {
  lanes.is_shared ? store_some(p, v, lanes.first, lanes.last) : store_vector(p, v);
}
// A streaming store, for results that are too large to stay in cache: an ordinary store would first read the memory
// that it overwrites. p is aligned to kBytes.
template <int kBytes>
BN_EXT_INLINE void stream_bytes(void* p, const void* v) {
#if defined(BN_EXT_AVX512)
  if constexpr (kBytes == 64) return _mm512_stream_si512((__m512i*)p, load_bits<__m512i>(v));
#endif
#if defined(BN_EXT_AVX2) || defined(BN_EXT_AVX512)
  if constexpr (kBytes == 32) return _mm256_stream_si256((__m256i*)p, load_bits<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16) return _mm_stream_si128((__m128i*)p, load_bits<__m128i>(v));
#endif
  __builtin_memcpy(p, v, kBytes);
}
template <typename T>
BN_EXT_INLINE void store(T* p, Vec<acc_t<T>> v, StreamedLanes) {
  T buffer[kLanes<acc_t<T>>];
  store_vector(buffer, v);
  stream_bytes<sizeof(buffer)>(p, buffer);
}
// Orders earlier streaming stores before later stores, so that other threads see them.
BN_EXT_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Not std::min: the whole program might use a library template that was compiled for this instruction set.
BN_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename A>
BN_EXT_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// a * b + c, rounded once if the instruction set has an FMA. GCC fuses product and sum only if they are in one basic
// block after inlining, and results must not depend on that.
template <typename A>
BN_EXT_INLINE Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(BN_EXT_AVX512)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(BN_EXT_AVX2)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
