// Loops over contiguous (N, C, S) tensors: a channel is N runs of S values.
#include "epilogue.inl"

// A mean that is inf or NaN cannot serve as a shift. The shift is then zero.
template <typename A>
BN_EXT_INLINE A finite_or_zero(A shift) {
  return shift - shift == A(0) ? shift : A(0);
}

// Calls body(channel, offset of the first value, length <= kMaxRun) for each piece of a run, in memory order.
template <typename Body>
BN_EXT_INLINE void for_each_run(const PlaneRange& r, const Body& body) {
  for (int64_t m = r.m_begin; m < r.m_end;) {
    const int64_t image = m / r.s;
    const int64_t position = m - image * r.s;
    const int64_t length = smaller(r.s - position, r.m_end - m);
    for (int64_t c = r.c_begin; c < r.c_end; ++c) {
      const int64_t offset = (image * r.c + c) * r.s + position;
      for (int64_t i = 0; i < length; i += kMaxRun) body(c, offset + i, smaller(kMaxRun, length - i));
    }
    m += length;
  }
}

// Like for_each_run, for one channel: body(offset, length).
template <typename Body>
BN_EXT_INLINE void for_each_run_of(const PlaneRange& r, int64_t c, const Body& body) {
  int64_t image = r.m_begin / r.s;
  int64_t position = r.m_begin - image * r.s;
  for (int64_t remaining = r.m_end - r.m_begin; remaining > 0; ++image) {
    const int64_t length = smaller(r.s - position, remaining);
    const int64_t offset = (image * r.c + c) * r.s + position;
    for (int64_t i = 0; i < length; i += kMaxRun) body(offset + i, smaller(kMaxRun, length - i));
    position = 0;
    remaining -= length;
  }
}

// Two sums over a channel's values. For each run, add(offset, length, s, q) adds to the vectors s and q. These
// accumulate up to kMaxRun values, of several runs, before they are added in double.
struct PlaneSums {
  double first = 0;
  double second = 0;
};
template <typename A, typename Add>
BN_EXT_INLINE PlaneSums sum_plane(const PlaneRange& r, int64_t c, const Add& add) {
  PlaneSums sums;
  Vec<A> s[4] = {};
  Vec<A> q[4] = {};
  int64_t pending = 0;
  const auto collect = [&]() BN_EXT_LAMBDA {
    sums.first += sum_of_four<A>(s);
    sums.second += sum_of_four<A>(q);
  };
  for_each_run_of(r, c, [&](int64_t offset, int64_t length) BN_EXT_LAMBDA {
    if (pending + length > kMaxRun) {
      collect();
      s[0] = s[1] = s[2] = s[3] = q[0] = q[1] = q[2] = q[3] = Vec<A>{};
      pending = 0;
    }
    add(offset, length, s, q);
    pending += length;
  });
  collect();
  return sums;
}

template <typename T>
static acc_t<T> run_sum(const T* x, int64_t n) {
  using A = acc_t<T>;
  Vec<A> sum[4] = {};
  for_each_vector<A>(
      n, [&](int64_t i, const auto& lanes, int u) BN_EXT_LAMBDA { sum[u] += keep<A>(load(x + i, lanes), lanes); });
  return sum_of_four<A>(sum);
}

template <typename T>
static Moments channel_moments(const PlaneRange& r, const T* x, int64_t c, acc_t<T> shift) {
  using A = acc_t<T>;
  const Vec<A> around = broadcast(shift);
  const auto sums = sum_plane<A>(r, c, [&](int64_t offset, int64_t length, Vec<A>(&s)[4], Vec<A>(&q)[4]) BN_EXT_LAMBDA {
    for_each_vector<A>(length, [&](int64_t i, const auto& lanes, int u) BN_EXT_LAMBDA {
      fetch_ahead(x + offset + i, u, r.ahead);
      const Vec<A> d = keep<A>(load(x + offset + i, lanes) - around, lanes);
      s[u] += d;
      q[u] += d * d;
    });
  });
  return moments_around(double(shift), sums.first, sums.second, double(r.m_end - r.m_begin));
}

// Reads each value once and sums around a shift, the mean of the channel's first run, so nothing cancels if the mean is
// large compared with the deviation. If the first run was unlike the rest, the values are read and summed again.
template <typename T>
static void plane_moments(const PlaneRange& r, const T* x, Moments* out) {
  using A = acc_t<T>;
  const int64_t image = r.m_begin / r.s;
  const int64_t position = r.m_begin - image * r.s;
  const int64_t length = smaller(smaller(r.s - position, r.m_end - r.m_begin), kMaxRun);
  for (int64_t c = r.c_begin; c < r.c_end; ++c) {
    const A shift = finite_or_zero(run_sum(x + (image * r.c + c) * r.s + position, length) / A(length));
    Moments moments = channel_moments(r, x, c, shift);
    if (is_far(double(shift), moments, double(r.m_end - r.m_begin))) {
      moments = channel_moments(r, x, c, finite_or_zero(A(moments.mean)));
    }
    out[c - r.c_begin] = moments;
  }
}

// Returns a function u(i, lanes): u of the vector at index i in the channel's run that starts at x.
template <typename T>
BN_EXT_INLINE auto plane_u(const Affine<acc_t<T>>& affine, int64_t c, const T* x) {
  using A = acc_t<T>;
  const Vec<A> mean = broadcast(affine.mean[c]);
  const Vec<A> scale = broadcast(affine.scale[c]);
  const Vec<A> offset = broadcast(affine.offset[c]);
  return [=](int64_t i, const auto& lanes)
             BN_EXT_LAMBDA { return affine_of<A>(load(x + i, lanes), mean, scale, offset); };
}

// Whether this is plain batch norm of a tensor that stays in cache. Its loops need no branches per run, which would
// take as long as the work if planes have only a few values. The loops take their arguments by value: stores cannot
// change these copies, so they stay in registers.
template <typename T>
BN_EXT_INLINE bool is_simple(const PlaneRange& r, const ApplyArguments<T>& a) {
  return a.activation.kind == ActivationKind::kNone && a.z == nullptr && r.ahead == 0 && !a.streams;
}
template <typename T>
BN_EXT_INLINE bool is_simple(const PlaneRange& r, const GradArguments<T>& a) {
  return a.activation.kind == ActivationKind::kNone && a.dz == nullptr && r.ahead == 0 && !a.streams && !a.dy_repeats;
}

template <typename T>
static void simple_apply(PlaneRange r, ApplyArguments<T> a) {
  for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
    const auto u_at = plane_u(a.affine, c, a.x + offset);
    for_each_vector<acc_t<T>>(length, [=, y = a.y + offset](int64_t i, const auto& lanes, int) BN_EXT_LAMBDA {
      store(y + i, u_at(i, lanes), lanes);
    });
  });
}

template <typename T>
static void plane_apply(const PlaneRange& r, const ApplyArguments<T>& a) {
  if (is_simple(r, a)) return simple_apply(r, a);
  Buffer<acc_t<T>> b;
  with_form(a, [=, &b](auto form, auto has_residual) BN_EXT_LAMBDA {
    for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
      apply_run<form(), has_residual()>(a, r.ahead, offset, length, b, plane_u(a.affine, c, a.x + offset));
    });
  });
  if (a.streams) end_of_stream();
}

// Returns a function (i, lanes): g of the vector at index i in the channel's run at `offset`.
template <GradientForm kForm, typename T>
BN_EXT_INLINE auto plane_gradient(
    const GradArguments<T>& a, int64_t c, int64_t offset, int64_t length, Buffer<acc_t<T>>& b) {
  const auto u_at = plane_u(a.affine, c, a.x + offset);
  if constexpr (kForm == GradientForm::kBuffered) differentiate_run(a, offset, length, b.u, u_at);
  return [=, &a, dy = a.dy_repeats ? a.dy : a.dy + offset, u = b.u](int64_t i, const auto& lanes)
             BN_EXT_LAMBDA { return gradient_at<kForm>(a, dy, offset, u, u_at, i, lanes); };
}

// For channels of at most kFewValues values: one vector takes each sum without losing digits. This choice depends only
// on shape and activation, so that sums are bit-equal for any size of the cache.
template <typename T>
static void simple_grad_sums(PlaneRange r, GradArguments<T> a, GradSums* out) {
  using A = acc_t<T>;
  for (int64_t c = r.c_begin; c < r.c_end; ++c) {
    const Vec<A> mean = broadcast(a.affine.mean[c]);
    Vec<A> s = {};
    Vec<A> q = {};
    for_each_run_of(r, c, [&](int64_t offset, int64_t length) BN_EXT_LAMBDA {
      const T* dy = a.dy + (a.dy_repeats ? 0 : offset);
      for_each_vector<A>(length, [&](int64_t i, const auto& lanes, int) BN_EXT_LAMBDA {
        const Vec<A> g = load(dy + i, lanes);
        s += keep<A>(g, lanes);
        q += keep<A>(g * (load(a.x + offset + i, lanes) - mean), lanes);
      });
    });
    out[c - r.c_begin] = {double(add_lanes<A>(s)), double(add_lanes<A>(q))};
  }
}

template <typename T>
static void plane_grad_sums(const PlaneRange& r, const GradArguments<T>& a, GradSums* out) {
  using A = acc_t<T>;
  const bool is_plain = a.activation.kind == ActivationKind::kNone;
  if (is_plain && r.m_end - r.m_begin <= kFewValues) return simple_grad_sums(r, a, out);
  Buffer<A> b;
  const int64_t ahead_of_dy = a.dy_repeats ? 0 : r.ahead;
  with_form(a, [=, &b](auto form) BN_EXT_LAMBDA {
    for (int64_t c = r.c_begin; c < r.c_end; ++c) {
      const Vec<A> mean = broadcast(a.affine.mean[c]);
      const auto add = [&](int64_t offset, int64_t length, Vec<A>(&s)[4], Vec<A>(&q)[4]) BN_EXT_LAMBDA {
        const T* x = a.x + offset;
        const T* dy = a.dy + (a.dy_repeats ? 0 : offset);
        const auto gradient = plane_gradient<form()>(a, c, offset, length, b);
        for_each_vector<A>(length, [&](int64_t i, const auto& lanes, int k) BN_EXT_LAMBDA {
          fetch_ahead(x + i, k, r.ahead);
          fetch_ahead(dy + i, k, ahead_of_dy);
          const Vec<A> g = gradient(i, lanes);
          s[k] += keep<A>(g, lanes);
          q[k] += keep<A>(g * (load(x + i, lanes) - mean), lanes);
        });
      };
      const auto sums = sum_plane<A>(r, c, add);
      out[c - r.c_begin] = {sums.first, sums.second};
    }
  });
}

template <bool kTraining, typename T>
static void simple_grad_input(PlaneRange r, GradArguments<T> a) {
  using A = acc_t<T>;
  for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
    const Vec<A> scale = broadcast(a.affine.scale[c]);
    const Vec<A> mean = broadcast(kTraining ? a.affine.mean[c] : A(0));
    const Vec<A> slope = broadcast(kTraining ? a.slope[c] : A(0));
    const Vec<A> shift = broadcast(kTraining ? a.shift[c] : A(0));
    const T* x = a.x + offset;
    const T* dy = a.dy + offset;
    T* dx = a.dx + offset;
    for_each_vector<A>(length, [=](int64_t i, const auto& lanes, int) BN_EXT_LAMBDA {
      const Vec<A> g = load(dy + i, lanes);
      if constexpr (kTraining) {
        store(dx + i, multiply_add<A>(g, scale, multiply_add<A>(load(x + i, lanes) - mean, slope, shift)), lanes);
      } else {
        store(dx + i, g * scale, lanes);
      }
    });
  });
}

template <typename T>
static void plane_grad_input(const PlaneRange& r, const GradArguments<T>& a) {
  using A = acc_t<T>;
  if (is_simple(r, a)) return a.training ? simple_grad_input<true>(r, a) : simple_grad_input<false>(r, a);
  Buffer<A> b;
  with_form(a, [&](auto form) BN_EXT_LAMBDA {
    with_outputs<form()>(a, [=, &b](auto has_dx, auto has_dz) BN_EXT_LAMBDA {
      for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
        const Vec<A> mean = broadcast(a.affine.mean[c]);
        const Vec<A> scale = broadcast(a.affine.scale[c]);
        const Vec<A> slope = broadcast(a.training ? a.slope[c] : A(0));
        const Vec<A> shift = broadcast(a.training ? a.shift[c] : A(0));
        const T* x = a.x + offset;
        const auto from_x = [=](int64_t i, const auto& lanes)
                                BN_EXT_LAMBDA { return multiply_add<A>(load(x + i, lanes) - mean, slope, shift); };
        const auto scale_at = [=](int64_t, const auto&) BN_EXT_LAMBDA { return scale; };
        const auto gradient = plane_gradient<form()>(a, c, offset, length, b);
        write_gradients<has_dx(), has_dz()>(a, r.ahead, offset, length, gradient, scale_at, from_x);
      });
    });
  });
  if (a.streams) end_of_stream();
}
