// What follows the normalisation: residual, activation, mask; and its gradient. It works on runs of adjacent values in
// a buffer, which stays in L1: so it exists once, whatever the layout.
#include "math.inl"

// A run on its way from one step to the next. Steps that change it work on whole vectors, also the last one, of which
// only the beginning counts.
template <typename A>
struct Buffer {
  A u[kMaxRun + kLanes<A>];
};

template <typename A>
BN_EXT_INLINE Vec<A> affine_of(Vec<A> x, Vec<A> mean, Vec<A> scale, Vec<A> offset) {
  return (x - mean) * scale + offset;
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

// How y comes from u: at once, or behind an activation that needs several steps by way of a buffer.
enum class ApplyForm { kPlain, kReluLike, kBuffered };

template <typename T>
BN_EXT_INLINE ApplyForm form_of(const ApplyArguments<T>& a) {
  if (a.activation.kind == ActivationKind::kReluLike) return ApplyForm::kReluLike;
  return a.activation.kind == ActivationKind::kNone ? ApplyForm::kPlain : ApplyForm::kBuffered;
}

// Writes y of the run at `offset`; u_at(i, lanes) gives u of the vector at i of the run.
template <typename T, typename U>
BN_EXT_INLINE void apply_run(
    const ApplyArguments<T>& a, int64_t offset, int64_t n, Buffer<acc_t<T>>& b, const U& u_at) {
  using A = acc_t<T>;
  const T* z = a.z + offset;
  T* y = a.y + offset;
  const auto sum_at = [=](int64_t i, const auto& lanes) {
    return a.z == nullptr ? u_at(i, lanes) : u_at(i, lanes) + load(z + i, lanes);
  };
  const ApplyForm form = form_of(a);
  if (form == ApplyForm::kPlain) {
    for_each_vector<A>(n, [=](int64_t i, const auto& lanes, int) { store(y + i, sum_at(i, lanes), lanes); });
    return;
  }
  if (form == ApplyForm::kReluLike && a.mask == nullptr) {
    const ReluLike<A> formula = relu_like<A>(a.activation);
    for_each_vector<A>(
        n, [=](int64_t i, const auto& lanes, int) { store(y + i, formula.value(sum_at(i, lanes)), lanes); });
    return;
  }
  for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int) { store_vector(b.u + i, sum_at(i, lanes)); });
  if (a.mask != nullptr) write_mask(relu_like<A>(a.activation), b.u, n, offset, a.mask);
  activate(a.activation, n, b.u);
  for_each_vector<A>(n, [=, u = b.u](int64_t i, const auto& lanes, int) { store(y + i, load_vector(u + i), lanes); });
}

// ---- backward ----

// How g comes from dy: likewise.
enum class GradientForm { kPlain, kMasked, kReluLike, kBuffered };

template <typename T>
BN_EXT_INLINE GradientForm form_of(const GradArguments<T>& a) {
  if (a.activation.kind == ActivationKind::kNone) return GradientForm::kPlain;
  if (a.mask != nullptr) return GradientForm::kMasked;
  const bool is_relu_like = a.activation.kind == ActivationKind::kReluLike && a.z == nullptr;
  return is_relu_like ? GradientForm::kReluLike : GradientForm::kBuffered;
}

template <typename A>
BN_EXT_INLINE Vec<A> relu_gradient(const ReluLike<A>& formula, Vec<A> dy, Mask<A> is_blocked) {
  const Vec<A> low = formula.slope == 0 ? Vec<A>{} : dy * formula.slope;  // not inf * 0
  return is_blocked ? low : dy;
}

// Calls body(gradient) where gradient(i, lanes) gives g of the vector at i of the run at `offset`. dy: of the run;
// u_at(i, lanes): its u.
template <typename T, typename U, typename Body>
BN_EXT_INLINE void with_gradient(const GradArguments<T>& a,
                                 const T* dy,
                                 int64_t offset,
                                 int64_t n,
                                 Buffer<acc_t<T>>& b,
                                 const U& u_at,
                                 const Body& body) {
  using A = acc_t<T>;
  const ReluLike<A> formula = relu_like<A>(a.activation);
  switch (form_of(a)) {
    case GradientForm::kPlain:
      return body([=](int64_t i, const auto& lanes) { return load(dy + i, lanes); });
    case GradientForm::kMasked:
      return body([=, mask = a.mask](int64_t i, const auto& lanes) {
        return relu_gradient<A>(formula, load(dy + i, lanes), ~read_mask<A>(mask, offset + i));
      });
    case GradientForm::kReluLike:
      return body([=](int64_t i, const auto& lanes) {
        return relu_gradient<A>(formula, load(dy + i, lanes), formula.blocked(u_at(i, lanes)));
      });
    case GradientForm::kBuffered: {
      for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int) {
        const Vec<A> u = u_at(i, lanes);
        store_vector(b.u + i, a.z == nullptr ? u : u + load(a.z + offset + i, lanes));
      });
      differentiate(a.activation, n, b.u);
      const A* derivatives = b.u;
      return body([=](int64_t i, const auto& lanes) { return load(dy + i, lanes) * load_vector(derivatives + i); });
    }
  }
}

// Writes dx and dz of the run at `offset`, as they are wanted: dx is dx_of(g, i, lanes) in training, else
// dx_in_eval(g, i, lanes), which does not look at x: an inf in it must not reach dx.
template <typename T, typename Gradient, typename Dx, typename DxInEval>
BN_EXT_INLINE void write_gradients(const GradArguments<T>& a,
                                   int64_t offset,
                                   int64_t n,
                                   const Gradient& gradient,
                                   const Dx& dx_of,
                                   const DxInEval& dx_in_eval) {
  using A = acc_t<T>;
  T* dx = a.dx + offset;
  T* dz = a.dz + offset;
  const auto write = [=, wants_dz = a.dz != nullptr](const auto& dx_of_g) {
    for_each_vector<A>(n, [=](int64_t i, const auto& lanes, int) {
      const Vec<A> g = gradient(i, lanes);
      store(dx + i, dx_of_g(g, i, lanes), lanes);
      if (wants_dz) store(dz + i, g, lanes);
    });
  };
  if (a.dx == nullptr) {
    for_each_vector<A>(n, [=](int64_t i, const auto& lanes, int) { store(dz + i, gradient(i, lanes), lanes); });
  } else if (a.training) {
    write(dx_of);
  } else {
    write(dx_in_eval);
  }
}
