// Ways through a run of adjacent values, vector by vector.
#include "vector.inl"

constexpr int64_t kLineBytes = 64;

// Asks for what a walk comes to later: the processor's own prefetchers stop at the end of a page, and do not know where
// the next run begins. u: as in for_each_vector; mostly, a cache line is asked for once. 0 bytes: nothing.
template <typename T>
BN_EXT_INLINE void fetch_ahead(const T* p, int u, int64_t bytes) {
  constexpr int kPerLine = kLineBytes / int(kLanes<acc_t<T>> * sizeof(T));
  if (u % kPerLine == 0 && bytes != 0) __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, 2);
}

// Visits [begin, n): body(i, lanes, u) for the vector at i; u in 0..3 numbers the independent accumulators. Before
// `begin` there is nothing, or whole vectors.
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
  const int64_t rest = n - i;
  if (rest == 0) return;
  if (n >= L) {
    body(n - L, last_lanes<A>(rest), 1);
  } else {
    body(i, first_lanes<A>(rest), 1);
  }
}

// Visits [0, n) to write it past the caches: whole lines, of which `head` values of the run are before the first, with
// StreamedLanes; the ends, whose lines are shared with a neighbour, with SomeLanes. n is two lines at least.
template <typename T, typename Body>
BN_EXT_INLINE void for_each_streamed_vector(int64_t head, int64_t n, const Body& body) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  constexpr int64_t kPerLine = kLineBytes / int64_t(sizeof(T));
  const int64_t tail = head + (n - head) / kPerLine * kPerLine;
  const auto write_end = [&](int64_t begin, int64_t end) BN_EXT_LAMBDA {
    for (int64_t i = begin; i < end; i += L) {
      const int64_t p = smaller(i, n - L);
      body(p, SomeLanes{i - p, smaller(L, end - i)}, 0);
    }
  };
  write_end(0, head);
  int64_t i = head;
  for (; i + 4 * L <= tail; i += 4 * L) {
    body(i, StreamedLanes{}, 0);
    body(i + L, StreamedLanes{}, 1);
    body(i + 2 * L, StreamedLanes{}, 2);
    body(i + 3 * L, StreamedLanes{}, 3);
  }
  for (; i < tail; i += L) body(i, StreamedLanes{}, 0);
  write_end(tail, n);
}

// How many values lie before the first whole cache line.
template <typename T>
BN_EXT_INLINE int64_t before_line(const T* p) {
  return int64_t(-reinterpret_cast<uintptr_t>(p) % kLineBytes / sizeof(T));
}

// Visits [0, n) to write it to `to`.
template <typename T, typename Body>
BN_EXT_INLINE void write_vectors(bool streams, const T* to, int64_t n, const Body& body) {
  if (streams && n * int64_t(sizeof(T)) >= 2 * kLineBytes) {
    for_each_streamed_vector<T>(before_line(to), n, body);
  } else {
    for_each_vector<acc_t<T>>(n, body);
  }
}

// The halves of a vector. In registers: through memory, they would wait for the whole to be stored.
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

// Sum of the lanes, by halves.
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
