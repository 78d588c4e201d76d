// The steps after the normalisation (residual, activation, mask) and their gradients. They work on runs of adjacent
// values in a buffer that stays in L1, so the same code serves all layouts.
#include "math.inl"

// Holds a run between two steps. A step that changes it works on whole vectors; of the last vector, only the first
// values are used.
template <typename A>
struct Buffer {
  A u[kMaxRun + kLanes<A>];
};

template <typename A>
BN_EXT_INLINE Vec<A> affine_of(Vec<A> x, Vec<A> mean, Vec<A> scale, Vec<A> offset) {
  return multiply_add<A>(x - mean, scale, offset);
}

// Replaces all vectors of a buffer, including the partial last one, by change(formula, vector).
template <typename A, typename Change>
BN_EXT_INLINE void change_buffer(const Activation& activation, int64_t n, A* values, const Change& change) {
  with_formula<A>(activation, [&](const auto& formula) BN_EXT_LAMBDA {
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

// Converts a buffer's values to type T and stores them.
template <typename T>
static void store_values(const acc_t<T>* values, int64_t n, T* to, bool streams) {
  const auto fetch = [](int64_t) {};
  write_vectors(!streams, streams, to, n, fetch, [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
    store(to + i, load_vector(values + i), lanes);
  });
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

// Returns one bit per lane; in `lanes`, each lane has all bits set or none.
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

// Returns one bit per lane: 1 if the value passes.
template <typename A>
BN_EXT_INLINE uint32_t passed_bits(const ReluLike<A>& formula, Vec<A> u) {
#if defined(BN_EXT_AVX512)  // GCC does not simplify bits_of(blocked(u)) to this
  if constexpr (sizeof(A) == 4) {
    const __m512 v = (__m512)u;
    return uint32_t(~(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LE_OQ) |
                      _mm512_cmp_ps_mask(v, _mm512_set1_ps(formula.upper), _CMP_GE_OQ)));
  }
#endif
  return ~bits_of<A>(formula.blocked(u));
}

// Sets the bits of the values that pass, from bit `first` on, in a mask of zeros. Another thread may set other bits of
// the first and of the last byte at the same time.
template <typename A>
static void write_mask(const ReluLike<A>& formula, const A* u, int64_t n, int64_t first, uint8_t* mask) {
  constexpr int64_t L = kLanes<A>;
  uint8_t* out = mask + first / 8;
  const auto passed_at = [&](int64_t i) BN_EXT_LAMBDA { return passed_bits(formula, load_vector(u + i)); };
  uint64_t bits = 0;
  int pending = int(first % 8);
  bool is_shared = pending > 0;
  const auto write_byte = [&](bool is_last) BN_EXT_LAMBDA {
    if (is_shared || is_last) {
      __atomic_fetch_or(out, uint8_t(bits), __ATOMIC_RELAXED);
    } else {
      *out = uint8_t(bits);
    }
    is_shared = false;
    bits >>= 8;
    pending -= 8;
    ++out;
  };
  for (int64_t i = 0; i < n; i += L) {
    const int count = int(smaller(L, n - i));
    bits |= uint64_t(passed_at(i) & ((1u << count) - 1)) << pending;
    pending += count;
    if (is_shared && pending >= 8) write_byte(false);
    if (pending >= 32) {
      __builtin_memcpy(out, &bits, 4);
      out += 4;
      bits >>= 32;
      pending -= 32;
    }
  }
  while (pending > 0) write_byte(pending < 8);
}

// Returns, for each lane, a if its bit from bit `first` on is 1, otherwise b.
template <typename A>
BN_EXT_INLINE Vec<A> select_passed(const uint8_t* mask, int64_t first, Vec<A> a, Vec<A> b) {
  uint32_t bits;
  __builtin_memcpy(&bits, mask + (first >> 3), sizeof(bits));
  bits >>= first & 7;
#if defined(BN_EXT_AVX512)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b, (__m512)a);
#endif
  return ((Mask<A>{} + int32_t(bits)) & lane_bits<A>()) != 0 ? a : b;
}

// Calls body(form...) in a separate function, because the loops of all forms in one function would lack registers. body
// is passed by value, and a body with loops captures its arguments by value: stores cannot change these copies, so the
// compiler need not reload them.
template <typename Body, typename... Form>
static __attribute__((noinline)) void call_apart(Body body, Form... form) {
  body(form...);
}

// ---- forward ----

// How y is computed from u: directly, directly with bits of a mask, or in several steps through a buffer.
enum class ApplyForm { kPlain, kReluLike, kMasked, kBuffered };

// Calls body(form, has_residual), both integral_constants.
template <typename T, typename Body>
BN_EXT_INLINE void with_form(const ApplyArguments<T>& a, const Body& body) {
  const auto call = [&](auto form) BN_EXT_LAMBDA {
    a.z == nullptr ? call_apart(body, form, std::false_type{}) : call_apart(body, form, std::true_type{});
  };
  if (a.activation.kind == ActivationKind::kNone) {
    return call(std::integral_constant<ApplyForm, ApplyForm::kPlain>{});
  }
  if (a.activation.kind != ActivationKind::kReluLike) {
    return call(std::integral_constant<ApplyForm, ApplyForm::kBuffered>{});
  }
  if (a.mask == nullptr) return call(std::integral_constant<ApplyForm, ApplyForm::kReluLike>{});
  return call(std::integral_constant<ApplyForm, ApplyForm::kMasked>{});
}

// Writes y of the run at `offset`. u_at(i, lanes) returns u of the vector at index i of the run.
template <ApplyForm kForm, bool kHasResidual, typename T, typename U>
BN_EXT_INLINE void apply_run(
    const ApplyArguments<T>& a, int64_t ahead, int64_t offset, int64_t n, Buffer<acc_t<T>>& b, const U& u_at) {
  using A = acc_t<T>;
  const T* x = a.x + offset;
  const T* z = kHasResidual ? a.z + offset : nullptr;
  T* y = a.y + offset;
  const ReluLike<A> formula = relu_like<A>(a.activation);
  constexpr int64_t L = kLanes<A>;
  // Bits of a mask are written per vector from the start of the run, which must start a line to be streamed.
  const bool streams = a.streams && (kForm != ApplyForm::kMasked || before_line(y) == 0);
  const int64_t ahead_of_y = streams ? 0 : ahead;  // ordinary stores read the lines that they overwrite
  const int64_t ahead_of_z = ahead == 0 ? 0 : kPageBytes;
  // If the run's bits start at a byte, each whole vector stores its bits directly.
  const int64_t whole = n / L * L;
  uint8_t* whole_bytes = nullptr;
  if (kForm == ApplyForm::kMasked && L % 8 == 0 && offset % 8 == 0) whole_bytes = a.mask + offset / 8;
  const auto fetch = [=](int64_t i) BN_EXT_LAMBDA {
    fetch_ahead(x + i, ahead);
    fetch_ahead(y + i, ahead_of_y);
    if constexpr (kHasResidual) fetch_ahead(z + i, ahead_of_z);
  };
  A* values = b.u;
  const auto write = [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
    Vec<A> u = u_at(i, lanes);
    if constexpr (kHasResidual) u += load(z + i, lanes);
    if constexpr (kForm == ApplyForm::kBuffered) return store_vector(values + i, u);
    if constexpr (kForm == ApplyForm::kMasked) {
      if (whole_bytes != nullptr && i + L <= whole) {
        const uint32_t passed = passed_bits(formula, u);
        __builtin_memcpy(whole_bytes + i / 8, &passed, L / 8);
      } else {
        store_vector(values + i, u);
      }
    }
    if constexpr (kForm == ApplyForm::kReluLike || kForm == ApplyForm::kMasked) u = formula.value(u);
    store(y + i, u, lanes);
  };
  if constexpr (kForm == ApplyForm::kBuffered) {
    const auto visit = [=](int64_t i, const auto& lanes, int k) BN_EXT_LAMBDA {
      fetch_ahead(x + i, k, ahead);
      fetch_ahead(y + i, k, ahead_of_y);
      if constexpr (kHasResidual) fetch_ahead(z + i, k, ahead_of_z);
      write(i, lanes);
    };
    for_each_vector<A>(n, visit);
    activate(a.activation, n, b.u);
    store_values(b.u, n, y, streams);
  } else {
    write_vectors(ahead == 0 && !streams, streams, y, n, fetch, write);
  }
  if constexpr (kForm == ApplyForm::kMasked) {
    const int64_t done = whole_bytes == nullptr ? 0 : whole;
    write_mask(formula, b.u + done, n - done, offset + done, a.mask);
  }
}

// ---- backward ----

// How g is computed from dy, likewise.
enum class GradientForm { kPlain, kMasked, kReluLike, kBuffered };

// Calls body(form), an integral_constant.
template <typename T, typename Body>
BN_EXT_INLINE void with_form(const GradArguments<T>& a, const Body& body) {
  if (a.activation.kind == ActivationKind::kNone) {
    return call_apart(body, std::integral_constant<GradientForm, GradientForm::kPlain>{});
  }
  if (a.mask != nullptr) return call_apart(body, std::integral_constant<GradientForm, GradientForm::kMasked>{});
  if (a.activation.kind == ActivationKind::kReluLike && a.z == nullptr && a.dz == nullptr) {
    return call_apart(body, std::integral_constant<GradientForm, GradientForm::kReluLike>{});
  }
  return call_apart(body, std::integral_constant<GradientForm, GradientForm::kBuffered>{});
}

// Returns g of the vector at index i of the run at `offset`. dy and derivatives (kBuffered only) start with the run.
template <GradientForm kForm, typename T, typename U, typename Lanes>
BN_EXT_INLINE Vec<acc_t<T>> gradient_at(const GradArguments<T>& a,
                                        const T* dy,
                                        int64_t offset,
                                        const acc_t<T>* derivatives,
                                        const U& u_at,
                                        int64_t i,
                                        const Lanes& lanes) {
  using A = acc_t<T>;
  const Vec<A> g = load(dy + i, lanes);
  if constexpr (kForm == GradientForm::kPlain) return g;
  const ReluLike<A> formula = relu_like<A>(a.activation);
  if constexpr (kForm == GradientForm::kBuffered) {
    const Vec<A> buffered = load_vector(derivatives + i);
    return a.activation.kind == ActivationKind::kReluLike ? formula.gradient(buffered, g) : g * buffered;
  }
  if constexpr (kForm == GradientForm::kReluLike) return formula.gradient(u_at(i, lanes), g);
  if constexpr (kForm == GradientForm::kMasked) return select_passed<A>(a.mask, offset + i, g, formula.held_back(g));
}

// Calls body(has_dx, has_dz), both integral_constants, at least one true. kPlain never writes dz, because dz equals dy.
// with_form chooses kReluLike only without dz.
template <GradientForm kForm, typename T, typename Body>
BN_EXT_INLINE void with_outputs(const GradArguments<T>& a, const Body& body) {
  if constexpr (kForm == GradientForm::kPlain || kForm == GradientForm::kReluLike) {
    return body(std::true_type{}, std::false_type{});
  } else {
    if (a.dz == nullptr) return call_apart(body, std::true_type{}, std::false_type{});
    if (a.dx == nullptr) return call_apart(body, std::false_type{}, std::true_type{});
    return call_apart(body, std::true_type{}, std::true_type{});
  }
}

// Writes activation'(u + z) of the run at `offset` to the buffer. For relu-like activations it writes u + z, and the
// gradient is selected by its value, because a product with a derivative of zero would turn an inf into NaN.
template <typename T, typename U>
BN_EXT_INLINE void differentiate_run(
    const GradArguments<T>& a, int64_t offset, int64_t n, acc_t<T>* derivatives, const U& u_at) {
  using A = acc_t<T>;
  for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int) BN_EXT_LAMBDA {
    const Vec<A> u = u_at(i, lanes);
    store_vector(derivatives + i, a.z == nullptr ? u : u + load(a.z + offset + i, lanes));
  });
  if (a.activation.kind != ActivationKind::kReluLike) differentiate(a.activation, n, derivatives);
}

// Writes dx (if kDx) and dz (if kDz) of the run at `offset`. dx is g * scale_at(i, lanes), in training plus
// from_x(i, lanes). In eval x is not read, because an inf in it must not reach dx.
template <bool kDx, bool kDz, typename T, typename Gradient, typename Scale, typename FromX>
BN_EXT_INLINE void write_gradients(const GradArguments<T>& a,
                                   int64_t ahead,
                                   int64_t offset,
                                   int64_t n,
                                   const Gradient& gradient,
                                   const Scale& scale_at,
                                   const FromX& from_x) {
  using A = acc_t<T>;
  T* dx = kDx ? a.dx + offset : nullptr;
  T* dz = kDz ? a.dz + offset : nullptr;
  const bool training = a.training;
  // Fetches x only if it is read: in eval, dx depends on dy alone unless u is needed.
  const bool has_u = a.activation.kind != ActivationKind::kNone && a.mask == nullptr;
  const int64_t ahead_of_x = has_u || (training && kDx) ? ahead : 0;
  const int64_t ahead_of_dy = a.dy_repeats ? 0 : ahead;
  const T* to = kDx ? dx : dz;
  const bool streams = a.streams && (!kDx || !kDz || before_line(dz) == before_line(dx));
  const int64_t ahead_of_to = streams ? 0 : ahead;  // as for y
  const T* x = a.x + offset;
  const T* dy = a.dy + (a.dy_repeats ? 0 : offset);
  const auto fetch = [=](int64_t i) BN_EXT_LAMBDA {
    fetch_ahead(x + i, ahead_of_x);
    fetch_ahead(dy + i, ahead_of_dy);
    fetch_ahead(to + i, ahead_of_to);
  };
  write_vectors(ahead == 0 && !streams, streams, to, n, fetch, [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
    const Vec<A> g = gradient(i, lanes);
    if constexpr (kDx) {
      Vec<A> sum = broadcast(A(-0.0));  // adding it changes nothing
      if (training) sum = from_x(i, lanes);
      store(dx + i, multiply_add<A>(g, scale_at(i, lanes), sum), lanes);
    }
    if constexpr (kDz) store(dz + i, g, lanes);
  });
}
