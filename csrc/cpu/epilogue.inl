// What follows the normalisation: residual, activation, mask; and its gradient. It works on runs of adjacent values in
// buffers, which stay in L1: so it exists once, whatever the layout.
#include "math.inl"

// Runs of values on their way, each step from one buffer to another: a run's last vector overlaps the one before, so
// that no step may change what it reads.
template <typename A>
struct Buffers {
  static constexpr int64_t kLength = kMaxRun + kLanes<A>;  // and the vector that the run's end begins
  A u[kLength];
  A sum[kLength];  // u + z
  A g[kLength];
};

template <typename A>
BN_EXT_INLINE Vec<A> affine_of(Vec<A> x, Vec<A> mean, Vec<A> scale, Vec<A> offset) {
  return (x - mean) * scale + offset;
}

// u + z; u itself where there is no residual. z: of the run.
template <typename T>
static acc_t<T>* add_residual(const T* z, int64_t n, Buffers<acc_t<T>>& b) {
  using A = acc_t<T>;
  if (z == nullptr) return b.u;
  for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int) {
    store_vector(b.sum + i, load_vector(b.u + i) + load(z + i, lanes));
  });
  return b.sum;
}

// Changes a buffer's values: change(formula, vector) of all vectors, the one that the end begins too.
template <typename A, typename Change>
BN_EXT_INLINE void change_buffer(const Activation& activation, int64_t n, A* values, const Change& change) {
  with_formula<A>(activation, [&](const auto& formula) {
    for (int64_t i = 0; i < n; i += kLanes<A>) store_vector(values + i, change(formula, load_vector(values + i)));
  });
}
template <typename A>
static void activate(const Activation& activation, int64_t n, A* u) {
  change_buffer(activation, n, u, [](const auto& formula, Vec<A> v) { return formula.value(v); });
}
template <typename A>
static void differentiate(const Activation& activation, int64_t n, A* u) {
  change_buffer(activation, n, u, [](const auto& formula, Vec<A> v) { return formula.derivative(v); });
}

template <typename A>
BN_EXT_INLINE ReluLike<A> relu_like(const Activation& activation) {
  return {static_cast<A>(activation.alpha), static_cast<A>(activation.upper)};
}

// ---- masks ----

template <typename A>
BN_EXT_INLINE Mask<A> lane_bits() {
  return (Mask<A>{} + 1) << lane_index<A>();
}

// One bit per lane, from a vector of all bits or none.
template <typename A>
BN_EXT_INLINE uint32_t bits_of(Mask<A> lanes) {
#if defined(BN_EXT_AVX512)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask((__m512i)lanes);
#elif defined(BN_EXT_AVX2)
  if constexpr (sizeof(A) == 4) return uint32_t(_mm256_movemask_ps((__m256)lanes));
  if constexpr (sizeof(A) == 8) return uint32_t(_mm256_movemask_pd((__m256d)lanes));
#else
  const Mask<A> bits = lanes & lane_bits<A>();
  uint32_t sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum |= uint32_t(bits[i]);
  return sum;
#endif
}

// The bits of the values that pass, from bit `first` on. The first and the last byte may have bits of neighbours, which
// another thread sets at the same time; the mask was zero.
template <typename A>
static void write_mask(const ReluLike<A>& formula, const A* u, int64_t n, int64_t first, uint8_t* mask) {
  uint8_t* out = mask + first / 8;
  int pending = int(first % 8);
  uint32_t bits = 0;
  bool is_shared = pending > 0;
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const int count = int(smaller(kLanes<A>, n - i));
    const uint32_t passed = ~bits_of<A>(formula.blocked(load_vector(u + i))) & ((1u << count) - 1);
    bits |= passed << pending;
    for (pending += count; pending >= 8; pending -= 8, bits >>= 8, ++out) {
      if (is_shared) {
        __atomic_fetch_or(out, uint8_t(bits), __ATOMIC_RELAXED);
      } else {
        *out = uint8_t(bits);
      }
      is_shared = false;
    }
  }
  if (pending > 0) __atomic_fetch_or(out, uint8_t(bits), __ATOMIC_RELAXED);
}

// All bits in the lanes whose value passed, for the values from bit `first` on.
template <typename A>
BN_EXT_INLINE Mask<A> read_mask(const uint8_t* mask, int64_t first) {
  uint32_t bits;
  __builtin_memcpy(&bits, mask + first / 8, sizeof(bits));
  return ((Mask<A>{} + int32_t(bits >> first % 8)) & lane_bits<A>()) != 0;
}

// ---- forward ----

template <typename T>
BN_EXT_INLINE bool has_epilogue(const ApplyArguments<T>& a) {
  return a.z != nullptr || a.activation.kind != ActivationKind::kNone;
}

// y of the run at `offset`, from b.u.
template <typename T>
static void finish_run(const ApplyArguments<T>& a, int64_t offset, int64_t n, Buffers<acc_t<T>>& b) {
  using A = acc_t<T>;
  A* u = add_residual(a.z == nullptr ? nullptr : a.z + offset, n, b);
  T* y = a.y + offset;
  const ReluLike<A> formula = relu_like<A>(a.activation);
  if (a.mask != nullptr) write_mask(formula, u, n, offset, a.mask);
  if (a.activation.kind == ActivationKind::kReluLike) {
    for_each_vector<A>(
        n, [=](int64_t i, const auto& lanes, int) { store(y + i, formula.value(load_vector(u + i)), lanes); });
    return;
  }
  if (a.activation.kind != ActivationKind::kNone) activate(a.activation, n, u);
  for_each_vector<A>(n, [=](int64_t i, const auto& lanes, int) { store(y + i, load_vector(u + i), lanes); });
}

// ---- backward ----

template <typename T>
BN_EXT_INLINE bool has_epilogue(const GradArguments<T>& a) {
  return a.activation.kind != ActivationKind::kNone;
}

// Whether gradient_of_run wants u.
template <typename T>
BN_EXT_INLINE bool needs_u(const GradArguments<T>& a) {
  return a.mask == nullptr;
}

// b.g of the run at `offset`, from b.u. dy: of the run.
template <typename T>
static void gradient_of_run(const GradArguments<T>& a, const T* dy, int64_t offset, int64_t n, Buffers<acc_t<T>>& b) {
  using A = acc_t<T>;
  const ReluLike<A> formula = relu_like<A>(a.activation);
  const auto relu_gradient = [&](const auto& is_blocked) {
    for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int) {
      const Vec<A> g = load(dy + i, lanes);
      const Vec<A> low = formula.slope == 0 ? Vec<A>{} : g * formula.slope;  // not inf * 0
      store_vector(b.g + i, is_blocked(i) ? low : g);
    });
  };
  if (a.mask != nullptr) return relu_gradient([&](int64_t i) { return ~read_mask<A>(a.mask, offset + i); });
  A* u = add_residual(a.z == nullptr ? nullptr : a.z + offset, n, b);
  if (a.activation.kind == ActivationKind::kReluLike) {
    return relu_gradient([&](int64_t i) { return formula.blocked(load_vector(u + i)); });
  }
  differentiate(a.activation, n, u);
  for_each_vector<A>(
      n, [&](int64_t i, const auto& lanes, int) { store_vector(b.g + i, load(dy + i, lanes) * load_vector(u + i)); });
}

// dz of a run, from b.g.
template <typename T>
static void store_gradient(const Buffers<acc_t<T>>& b, int64_t n, T* dz) {
  for_each_vector<acc_t<T>>(n, [&](int64_t i, const auto& lanes, int) { store(dz + i, load_vector(b.g + i), lanes); });
}
