// Loops over (rows, columns) tensors, a column belonging to one channel.
// Sums take several rows together, so that a column's accumulators are loaded once for all of them. A range is at most
// kMaxColumns wide, so that accumulators and coefficients stay in L1.
#include "planes.inl"

constexpr int64_t kRowBlock = 128;     // rows summed in the accumulate type before they go into double
constexpr int64_t kRowsToSum = 8;      // at a time
constexpr int64_t kRowsForShift = 16;  // whose mean the moments are taken around

// Calls body(first row, integral_constant of the number of rows) for [begin, end).
template <typename Body>
BN_EXT_INLINE void for_each_rows(int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin;
  for (; row + kRowsToSum <= end; row += kRowsToSum) body(row, std::integral_constant<int64_t, kRowsToSum>{});
  for (; row < end; ++row) body(row, std::integral_constant<int64_t, 1>{});
}

// Two sums per column, kept in double.
struct ColumnSums {
  double first[kMaxColumns];
  double second[kMaxColumns];
};

// Calls terms(row, column, lanes, s, q), which adds to the vectors s and q, for all rows of the range and its columns,
// counted from column_begin on; before some rows, prepare(first row, their number), at most kRowsToSum.
template <typename A, typename Prepare, typename Terms>
BN_EXT_INLINE void sum_rows(const RowRange& r, ColumnSums& sums, const Prepare& prepare, const Terms& terms) {
  const int64_t width = r.column_end - r.column_begin;
  // Padded: a vector at the last column may reach beyond it.
  A first[kMaxColumns + kLanes<A>];
  A second[kMaxColumns + kLanes<A>];
  for (int64_t i = 0; i < width; ++i) sums.first[i] = sums.second[i] = 0;
  for (int64_t begin = r.row_begin; begin < r.row_end; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < r.row_end ? begin + kRowBlock : r.row_end;
    __builtin_memset(first, 0, sizeof(A) * (width + kLanes<A>));
    __builtin_memset(second, 0, sizeof(A) * (width + kLanes<A>));
    for_each_rows(begin, end, [&](int64_t row, auto rows) {
      prepare(row, int64_t(rows));
      for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
        Vec<A> s = {};  // of these rows first: short sums round less
        Vec<A> q = {};
        for (int64_t k = 0; k < rows; ++k) terms(row + k, i, lanes, s, q);
        store_vector(first + i, load_vector(first + i) + s);
        store_vector(second + i, load_vector(second + i) + q);
      });
    });
    for (int64_t i = 0; i < width; ++i) sums.first[i] += first[i];
    for (int64_t i = 0; i < width; ++i) sums.second[i] += second[i];
  }
}

template <typename A, typename Terms>
BN_EXT_INLINE void sum_rows(const RowRange& r, ColumnSums& sums, const Terms& terms) {
  sum_rows<A>(r, sums, [](int64_t, int64_t) {}, terms);
}

// As plane_moments_around, one shift per column, kLanes more readable ones behind them.
template <typename T>
static bool row_moments_around(const RowRange& r, const T* x, const acc_t<T>* shift, Moments* out) {
  using A = acc_t<T>;
  const T* base = x + r.column_begin;
  const double count = double(r.row_end - r.row_begin);
  ColumnSums sums;
  sum_rows<A>(r, sums, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>& q) {
    const Vec<A> d = keep(load(base + row * r.columns + i, lanes) - load_vector(shift + i), lanes);
    s += d;
    q += d * d;
  });
  bool any_far = false;
  for (int64_t i = 0; i < r.column_end - r.column_begin; ++i) {
    out[i] = moments_around(double(shift[i]), sums.first[i], sums.second[i], count);
    any_far |= is_far(double(shift[i]), out[i], count);
  }
  return any_far;
}

// As plane_moments: around the mean of the first rows.
template <typename T>
static void row_moments(const RowRange& r, const T* x, Moments* out) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const T* base = x + r.column_begin;
  A shift[kMaxColumns + kLanes<A>] = {};
  RowRange head = r;
  head.row_end = smaller(r.row_end, r.row_begin + kRowsForShift);
  ColumnSums sums;
  sum_rows<A>(head, sums, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>&) {
    s += keep(load(base + row * r.columns + i, lanes), lanes);
  });
  const double head_rows = double(head.row_end - head.row_begin);
  for (int64_t i = 0; i < width; ++i) shift[i] = finite_or_zero(A(sums.first[i] / head_rows));
  if (!row_moments_around(r, x, shift, out)) return;
  for (int64_t i = 0; i < width; ++i) shift[i] = finite_or_zero(A(out[i].mean));
  row_moments_around(r, x, shift, out);
}

// The coefficients of a range's columns, counted from column_begin on.
template <typename A>
BN_EXT_INLINE Affine<A> affine_from(const Affine<A>& affine, const RowRange& r) {
  return {affine.mean + r.column_begin, affine.scale + r.column_begin, affine.offset + r.column_begin};
}

template <typename A, typename Lanes>
BN_EXT_INLINE Vec<A> row_affine_of(Vec<A> x, const Affine<A>& k, int64_t i, const Lanes& lanes) {
  return affine_of<A>(x, load(k.mean + i, lanes), load(k.scale + i, lanes), load(k.offset + i, lanes));
}

// dy of a row, from column_begin on.
template <typename T>
BN_EXT_INLINE const T* row_of_dy(const RowRange& r, const GradArguments<T>& a, int64_t row) {
  return a.dy_repeats ? a.dy : a.dy + row * r.columns + r.column_begin;
}

// Behind an activation: g of a row, into b.g.
template <typename T>
static void row_gradient(const RowRange& r, const GradArguments<T>& a, int64_t row, Buffers<acc_t<T>>& b) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const int64_t offset = row * r.columns + r.column_begin;
  const Affine<A> k = affine_from(a.affine, r);
  if (needs_u(a)) {
    for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
      store_vector(b.u + i, row_affine_of<A>(load(a.x + offset + i, lanes), k, i, lanes));
    });
  }
  gradient_of_run(a, row_of_dy(r, a, row), offset, width, b);
}

// gradient(row): where the values of g begin, from column_begin on.
template <typename T, typename Prepare, typename Gradient>
BN_EXT_INLINE void sum_row_gradients(
    const RowRange& r, const GradArguments<T>& a, GradSums* out, const Prepare& prepare, const Gradient& gradient) {
  using A = acc_t<T>;
  const T* x = a.x + r.column_begin;
  const A* mean = a.affine.mean + r.column_begin;
  ColumnSums sums;
  sum_rows<A>(r, sums, prepare, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>& q) {
    const Vec<A> g = load(gradient(row) + i, lanes);
    const Vec<A> centred = load(x + row * r.columns + i, lanes) - load(mean + i, lanes);
    s += keep(g, lanes);
    q += keep(g * centred, lanes);
  });
  for (int64_t i = 0; i < r.column_end - r.column_begin; ++i) out[i] = {sums.first[i], sums.second[i]};
}

template <typename T>
static void row_grad_sums(const RowRange& r, const GradArguments<T>& a, GradSums* out) {
  using A = acc_t<T>;
  if (!has_epilogue(a)) {
    const T* dy = row_of_dy(r, a, 0);
    const int64_t stride = a.dy_repeats ? 0 : r.columns;
    const auto gradient = [=](int64_t row) { return dy + row * stride; };
    return sum_row_gradients(r, a, out, [](int64_t, int64_t) {}, gradient);
  }
  constexpr int64_t kStride = kMaxColumns + kLanes<A>;
  A g[kRowsToSum * kStride];
  Buffers<A> b;
  const auto prepare = [&](int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) {
      row_gradient(r, a, row, b);
      __builtin_memcpy(g + (row % kRowsToSum) * kStride, b.g, sizeof(A) * (r.column_end - r.column_begin));
    }
  };
  sum_row_gradients(r, a, out, prepare, [&](int64_t row) { return g + (row % kRowsToSum) * kStride; });
}

// Writers go row by row, in memory order: several rows at a time were slower, by up to a third where C is 256 or 512.
template <typename T>
static void row_apply(const RowRange& r, const ApplyArguments<T>& a) {
  using A = acc_t<T>;
  const bool is_plain = !has_epilogue(a);
  const int64_t width = r.column_end - r.column_begin;
  const Affine<A> k = affine_from(a.affine, r);
  Buffers<A> b;
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
    const int64_t offset = row * r.columns + r.column_begin;
    const T* x = a.x + offset;
    T* y = a.y + offset;
    if (is_plain) {
      for_each_vector<A>(width, [=](int64_t i, const auto& lanes, int) {
        store(y + i, row_affine_of<A>(load(x + i, lanes), k, i, lanes), lanes);
      });
    } else {
      for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
        store_vector(b.u + i, row_affine_of<A>(load(x + i, lanes), k, i, lanes));
      });
      finish_run(a, offset, width, b);
    }
  }
}

// g: of the row, from column_begin on.
template <typename T, typename G>
BN_EXT_INLINE void row_dx(const RowRange& r, const GradArguments<T>& a, int64_t row, const G* g) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const T* x = a.x + row * r.columns + r.column_begin;
  T* dx = a.dx + row * r.columns + r.column_begin;
  const A* scale = a.affine.scale + r.column_begin;
  if (!a.training) {  // x is not looked at: an inf in it must not reach dx
    for_each_vector<A>(width, [=](int64_t i, const auto& lanes, int) {
      store(dx + i, load(g + i, lanes) * load(scale + i, lanes), lanes);
    });
    return;
  }
  const A* mean = a.affine.mean + r.column_begin;
  const A* slope = a.slope + r.column_begin;
  const A* shift = a.shift + r.column_begin;
  for_each_vector<A>(width, [=](int64_t i, const auto& lanes, int) {
    const Vec<A> centred = load(x + i, lanes) - load(mean + i, lanes);
    const Vec<A> from_x = centred * load(slope + i, lanes) + load(shift + i, lanes);
    store(dx + i, load(g + i, lanes) * load(scale + i, lanes) + from_x, lanes);
  });
}

template <typename T>
static void row_grad_input(const RowRange& r, const GradArguments<T>& a) {
  if (!has_epilogue(a)) {
    for (int64_t row = r.row_begin; row < r.row_end; ++row) row_dx(r, a, row, row_of_dy(r, a, row));
    return;
  }
  Buffers<acc_t<T>> b;
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
    row_gradient(r, a, row, b);
    const int64_t offset = row * r.columns + r.column_begin;
    if (a.dz != nullptr) store_gradient(b, r.column_end - r.column_begin, a.dz + offset);
    if (a.dx != nullptr) row_dx(r, a, row, b.g);
  }
}
