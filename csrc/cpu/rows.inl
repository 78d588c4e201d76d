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
// counted from column_begin on.
template <typename A, typename Terms>
BN_EXT_INLINE void sum_rows(const RowRange& r, ColumnSums& sums, const Terms& terms) {
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

template <typename T>
static void row_grad_sums(
    const RowRange& r, const T* dy, bool dy_repeats, const T* x, const acc_t<T>* mean, GradSums* out) {
  using A = acc_t<T>;
  const T* x_base = x + r.column_begin;
  const T* dy_base = dy_repeats ? dy : dy + r.column_begin;
  const int64_t dy_stride = dy_repeats ? 0 : r.columns;
  ColumnSums sums;
  sum_rows<A>(r, sums, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>& q) {
    const Vec<A> g = load(dy_base + row * dy_stride + i, lanes);
    const Vec<A> centred = load(x_base + row * r.columns + i, lanes) - load(mean + r.column_begin + i, lanes);
    s += keep(g, lanes);
    q += keep(g * centred, lanes);
  });
  for (int64_t i = 0; i < r.column_end - r.column_begin; ++i) out[i] = {sums.first[i], sums.second[i]};
}

// Writers go row by row, in memory order: several rows at a time were slower, by up to a third where C is 256 or 512.
template <typename T>
static void row_apply(const RowRange& r, const T* x, bool x_repeats, const ApplyCoefficients<acc_t<T>>& k, T* y) {
  using A = acc_t<T>;
  const A* mean = k.mean + r.column_begin;
  const A* scale = k.scale + r.column_begin;
  const A* shift = k.offset + r.column_begin;
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
    const int64_t offset = row * r.columns + r.column_begin;
    const T* px = x_repeats ? x : x + offset;
    T* py = y + offset;
    for_each_vector<A>(r.column_end - r.column_begin, [=](int64_t i, const auto& lanes, int) {
      const Vec<A> centred = load(px + i, lanes) - load(mean + i, lanes);
      store(py + i, centred * load(scale + i, lanes) + load(shift + i, lanes), lanes);
    });
  }
}

template <typename T>
static void row_grad_input(
    const RowRange& r, const T* dy, bool dy_repeats, const T* x, const GradCoefficients<acc_t<T>>& k, T* dx) {
  using A = acc_t<T>;
  const A* mean = k.mean + r.column_begin;
  const A* scale = k.scale + r.column_begin;
  const A* slope = k.slope + r.column_begin;
  const A* shift = k.offset + r.column_begin;
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
    const int64_t offset = row * r.columns + r.column_begin;
    const T* px = x + offset;
    const T* pdy = dy_repeats ? dy : dy + offset;
    T* pdx = dx + offset;
    for_each_vector<A>(r.column_end - r.column_begin, [=](int64_t i, const auto& lanes, int) {
      const Vec<A> centred = load(px + i, lanes) - load(mean + i, lanes);
      const Vec<A> from_x = centred * load(slope + i, lanes) + load(shift + i, lanes);
      store(pdx + i, load(pdy + i, lanes) * load(scale + i, lanes) + from_x, lanes);
    });
  }
}
