// Loops over a run of adjacent values, vector by vector.
#include "vector.inl"

constexpr int64_t kLineBytes = 64;

// Prefetches values that a loop reads later, because the hardware prefetchers stop at the end of a page and cannot
// predict the start of the next run. u as in for_each_vector: most lines are fetched once. 0 bytes: no prefetch.
template <typename T>
BN_EXT_INLINE void fetch_ahead(const T* p, int64_t bytes) {
  if (bytes != 0) __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, 2);
}
template <typename T>
BN_EXT_INLINE void fetch_ahead(const T* p, int u, int64_t bytes) {
  constexpr int kPerLine = kLineBytes / int(kLanes<acc_t<T>> * sizeof(T));
  if (u % kPerLine == 0) fetch_ahead(p, bytes);
}

// Calls body(i, lanes, u) for the vectors of [begin, n), at index i. u in 0..3 is the number of an independent
// accumulator. `begin` is a multiple of the vector's length.
template <typename A, typename Body>
BN_EXT_INLINE void for_each_vector(int64_t n, const Body& body, int64_t begin = 0) {
  constexpr int64_t L = kLanes<A>;
  int64_t i = begin;
  for (; i + 4 * L <= n; i += 4 * L) {
    body(i, AllLanes{}, 0);
    body(i + L, AllLanes{}, 1);
    body(i + 2 * L, AllLanes{}, 2);
    body(i + 3 * L, AllLanes{}, 3);
  }
  for (; i + L <= n; i += L) body(i, AllLanes{}, 0);
  if (i == n) return;
  const int64_t p = n < L ? 0 : n - L;
  body(p, EndLanes{i - p, n - p, n < L, n < L}, 1);
}

// Returns the number of values before the first whole cache line.
template <typename T>
BN_EXT_INLINE int64_t before_line(const T* p) {
  return int64_t(-reinterpret_cast<uintptr_t>(p) % kLineBytes / sizeof(T));
}

// Calls body(i, lanes) for the vectors of [0, n), to write them to `to`. If the values are not in cache, also calls
// fetch(i) for each cache line. If `streams`, whole lines are streamed, but the ends are not, because their lines are
// shared with a neighbour.
template <typename T, typename Fetch, typename Body>
BN_EXT_INLINE void write_vectors(
    bool in_cache, bool streams, const T* to, int64_t n, const Fetch& fetch, const Body& body) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  constexpr int64_t kPerLine = kLineBytes / int64_t(sizeof(T));
  if (n < 2 * kPerLine) streams = false;
  if (n >= L && !streams) {
    int64_t i = 0;
    if (in_cache) {
      for (; i + 4 * L <= n; i += 4 * L) {
        body(i, AllLanes{});
        body(i + L, AllLanes{});
        body(i + 2 * L, AllLanes{});
        body(i + 3 * L, AllLanes{});
      }
    } else {
      for (; i + kPerLine <= n; i += kPerLine) {
        fetch(i);
#pragma GCC unroll 2
        for (int64_t k = 0; k < kPerLine; k += L) body(i + k, AllLanes{});
      }
    }
    // The last vector overlaps the one before it and writes the same values again.
    for (; i < n; i += L) body(smaller(i, n - L), AllLanes{});
    return;
  }
  const int64_t head = streams ? before_line(to) : 0;
  int64_t tail = head;
  for (; streams && tail + kPerLine <= n; tail += kPerLine) {
    fetch(tail);
#pragma GCC unroll 2
    for (int64_t k = 0; k < kPerLine; k += L) body(tail + k, StreamedLanes{});
  }
  for (int64_t i = head == 0 ? tail : 0; i < n; i = i < head || i >= tail ? i : tail) {
    const int64_t stop = i < head ? head : n;
    const int64_t p = n < L ? 0 : smaller(i, n - L);
    const int64_t end = smaller(i + L, stop);
    body(p, EndLanes{i - p, end - p, n < L, true});
    i = end;
  }
}

// Splits a vector into halves, in registers: loads of the halves from memory would wait for the store of the whole.
template <typename Part, typename Whole>
BN_EXT_INLINE void halve(const Whole& whole, Part& low, Part& high) {
#if defined(BN_EXT_AVX512)
  if constexpr (sizeof(Whole) == 64) {
    low = (Part)_mm512_castsi512_si256((__m512i)whole);
    high = (Part)_mm512_extracti64x4_epi64((__m512i)whole, 1);
    return;
  }
#endif
#if defined(BN_EXT_AVX2) || defined(BN_EXT_AVX512)
  if constexpr (sizeof(Whole) == 32) {
    low = (Part)_mm256_castsi256_si128((__m256i)whole);
    high = (Part)_mm256_extracti128_si256((__m256i)whole, 1);
    return;
  }
#endif
  __builtin_memcpy(&low, &whole, sizeof(Part));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&whole) + sizeof(Part), sizeof(Part));
}

// Returns the sum of the lanes, by halves.
template <typename A, typename V>
BN_EXT_INLINE A add_lanes(const V& lanes) {
  if constexpr (sizeof(V) == sizeof(A)) {
    return lanes[0];
  } else {
    typedef A Part __attribute__((vector_size(sizeof(V) / 2)));
    Part low, high;
    halve(lanes, low, high);
    const Part sum = low + high;
    return add_lanes<A>(sum);
  }
}
template <typename A>
BN_EXT_INLINE A sum_of_four(const Vec<A> (&v)[4]) {
  const Vec<A> sum = (v[0] + v[1]) + (v[2] + v[3]);
  return add_lanes<A>(sum);
}
