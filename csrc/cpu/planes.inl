// Loops over contiguous (N, C, S) tensors: a channel is N runs of S values.
#include "epilogue.inl"

// A mean of deviations that overflows or is NaN cannot serve as a shift: then the values are taken as they are.
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

template <typename T>
static acc_t<T> run_sum(const T* x, int64_t n) {
  using A = acc_t<T>;
  Vec<A> sum[4] = {};
  for_each_vector<A>(
      n, [&](int64_t i, const auto& lanes, int u) BN_EXT_LAMBDA { sum[u] += keep(load(x + i, lanes), lanes); });
  return sum_of_four<A>(sum);
}

// Sum of (x - shift) and of its square, added to `sum` and `squares`.
template <typename T>
BN_EXT_INLINE void add_run_moments(const T* x, int64_t n, acc_t<T> shift, int64_t ahead, double& sum, double& squares) {
  using A = acc_t<T>;
  const Vec<A> vshift = broadcast(shift);
  Vec<A> s[4] = {};
  Vec<A> q[4] = {};
  for_each_vector<A>(n, [&](int64_t i, const auto& lanes, int u) BN_EXT_LAMBDA {
    fetch_ahead(x + i, u, ahead);
    const Vec<A> d = keep(load(x + i, lanes) - vshift, lanes);
    s[u] += d;
    q[u] += d * d;
  });
  sum += sum_of_four<A>(s);
  squares += sum_of_four<A>(q);
}

// The moments around `shift`, one value per channel; whether a shift was too far from the mean.
template <typename T>
static bool plane_moments_around(const PlaneRange& r, const T* x, const acc_t<T>* shift, Moments* out) {
  const int64_t channels = r.c_end - r.c_begin;
  const double count = double(r.m_end - r.m_begin);
  for (int64_t i = 0; i < channels; ++i) out[i] = {0, 0};
  for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
    const int64_t i = c - r.c_begin;
    // The two sums, until all is read.
    add_run_moments(x + offset, length, shift[i], r.ahead, out[i].mean, out[i].m2);
  });
  bool any_far = false;
  for (int64_t i = 0; i < channels; ++i) {
    out[i] = moments_around(double(shift[i]), out[i].mean, out[i].m2, count);
    any_far |= is_far(double(shift[i]), out[i], count);
  }
  return any_far;
}

// One pass around a shift, the mean of each channel's first run: no cancellation where the mean is large beside the
// deviation, and each value is read once. A second pass where the first run was unlike the rest.
template <typename T>
static void plane_moments(const PlaneRange& r, const T* x, Moments* out) {
  using A = acc_t<T>;
  A shift[kMaxGroup] = {};
  PlaneRange head = r;
  const int64_t left = r.s - r.m_begin % r.s;
  head.m_end = smaller(r.m_end, r.m_begin + smaller(left, kMaxRun));
  for_each_run(head, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
    shift[c - r.c_begin] = finite_or_zero(run_sum(x + offset, length) / A(length));
  });
  if (!plane_moments_around(r, x, shift, out)) return;
  for (int64_t i = 0; i < r.c_end - r.c_begin; ++i) shift[i] = finite_or_zero(A(out[i].mean));
  plane_moments_around(r, x, shift, out);
}

// u of a channel's run that begins at x: u(i, lanes) is that of the vector at i.
template <typename T>
BN_EXT_INLINE auto plane_u(const Affine<acc_t<T>>& affine, int64_t c, const T* x) {
  using A = acc_t<T>;
  const Vec<A> mean = broadcast(affine.mean[c]);
  const Vec<A> scale = broadcast(affine.scale[c]);
  const Vec<A> offset = broadcast(affine.offset[c]);
  return [=](int64_t i, const auto& lanes)
             BN_EXT_LAMBDA { return affine_of<A>(load(x + i, lanes), mean, scale, offset); };
}

template <typename T>
static void plane_apply(const PlaneRange& r, const ApplyArguments<T>& a) {
  Buffer<acc_t<T>> b;
  with_form(a, [&](auto form, auto has_residual) BN_EXT_LAMBDA {
    for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
      apply_run<form(), has_residual()>(a, r.ahead, offset, length, b, plane_u(a.affine, c, a.x + offset));
    });
  });
  if (a.streams) end_of_stream();
}

// Calls body(c, offset, length, gradient) for every run; gradient(i, lanes) is g of the vector at i.
template <typename T, typename Body>
BN_EXT_INLINE void for_each_gradient_run(const PlaneRange& r, const GradArguments<T>& a, const Body& body) {
  Buffer<acc_t<T>> b;
  with_form(a, [&](auto form) BN_EXT_LAMBDA {
    for_each_run(r, [&](int64_t c, int64_t offset, int64_t length) BN_EXT_LAMBDA {
      const T* dy = a.dy_repeats ? a.dy : a.dy + offset;
      const auto u_at = plane_u(a.affine, c, a.x + offset);
      if constexpr (form() == GradientForm::kBuffered) differentiate_run(a, offset, length, b.u, u_at);
      body(c, offset, length, [=, &a, u = b.u](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
        return gradient_at<form()>(a, dy, offset, u, u_at, i, lanes);
      });
    });
  });
}

template <typename T>
static void plane_grad_sums(const PlaneRange& r, const GradArguments<T>& a, GradSums* out) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < r.c_end - r.c_begin; ++i) out[i] = {0, 0};
  for_each_gradient_run(r, a, [&](int64_t c, int64_t offset, int64_t length, const auto& gradient) BN_EXT_LAMBDA {
    const Vec<A> mean = broadcast(a.affine.mean[c]);
    const T* x = a.x + offset;
    const T* dy = a.dy_repeats ? a.dy : a.dy + offset;
    Vec<A> s[4] = {};
    Vec<A> q[4] = {};
    for_each_vector<A>(length, [&](int64_t i, const auto& lanes, int k) BN_EXT_LAMBDA {
      fetch_ahead(x + i, k, r.ahead);
      fetch_ahead(dy + i, k, r.ahead);
      const Vec<A> g = gradient(i, lanes);
      s[k] += keep(g, lanes);
      q[k] += keep(g * (load(x + i, lanes) - mean), lanes);
    });
    out[c - r.c_begin].dy += sum_of_four<A>(s);
    out[c - r.c_begin].dy_centred += sum_of_four<A>(q);
  });
}

template <typename T>
static void plane_grad_input(const PlaneRange& r, const GradArguments<T>& a) {
  using A = acc_t<T>;
  for_each_gradient_run(r, a, [&](int64_t c, int64_t offset, int64_t length, const auto& gradient) BN_EXT_LAMBDA {
    const Vec<A> mean = broadcast(a.affine.mean[c]);
    const Vec<A> scale = broadcast(a.affine.scale[c]);
    const Vec<A> slope = broadcast(a.slope[c]);
    const Vec<A> shift = broadcast(a.shift[c]);
    const T* x = a.x + offset;
    const auto dx = [=](Vec<A> g, int64_t i, const auto& lanes)
                        BN_EXT_LAMBDA { return g * scale + ((load(x + i, lanes) - mean) * slope + shift); };
    const auto dx_in_eval = [=](Vec<A> g, int64_t, const auto&) BN_EXT_LAMBDA { return g * scale; };
    write_gradients(a, r.ahead, offset, length, gradient, dx, dx_in_eval);
  });
  if (a.streams) end_of_stream();
}
