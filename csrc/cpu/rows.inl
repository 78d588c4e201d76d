// Loops over (rows, columns) tensors, a column belonging to one channel.
// Several rows go together, so that a column's accumulators and coefficients are loaded once for all of them; a range
// is at most kMaxColumns wide, so that they stay in L1.
#include "planes.inl"

constexpr int64_t kRowBlock = 64;  // rows summed in the accumulate type before they go into double
constexpr int64_t kRowsTogether = 8;

// Calls body(first row, integral_constant of the number of rows) for [begin, end).
template <typename Body>
BN_EXT_INLINE void for_each_rows(int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) body(row, std::integral_constant<int64_t, kRowsTogether>{});
  for (; row < end; ++row) body(row, std::integral_constant<int64_t, 1>{});
}

// sums[i] += sum over the rows of first(x[row][i]), likewise second: both for all columns of the range.
template <typename A, typename Terms>
BN_EXT_INLINE void add_rows(int64_t begin, int64_t end, int64_t width, A* first, A* second, const Terms& terms) {
  for_each_rows(begin, end, [&](int64_t row, auto rows) {
    for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
      Vec<A> s = load_vector(first + i);
      Vec<A> q = load_vector(second + i);
      for (int64_t k = 0; k < rows; ++k) terms(row + k, i, lanes, s, q);
      store_vector(first + i, s);
      store_vector(second + i, q);
    });
  });
}

// Runs add_rows over blocks of rows and adds the blocks up in double: total[i] = {sum of first, sum of second}.
template <typename A, typename Total, typename Terms>
BN_EXT_INLINE void sum_rows(
    const RowRange& r, double Total::* first, double Total::* second, Total* total, const Terms& terms) {
  const int64_t width = r.column_end - r.column_begin;
  // Padded: a vector at the last column may reach beyond it.
  A s[kMaxColumns + kLanes<A>];
  A q[kMaxColumns + kLanes<A>];
  for (int64_t i = 0; i < width; ++i) total[i] = {0, 0};
  for (int64_t row = r.row_begin; row < r.row_end; row += kRowBlock) {
    const int64_t end = row + kRowBlock < r.row_end ? row + kRowBlock : r.row_end;
    __builtin_memset(s, 0, sizeof(A) * (width + kLanes<A>));
    __builtin_memset(q, 0, sizeof(A) * (width + kLanes<A>));
    add_rows(row, end, width, s, q, terms);
    for (int64_t i = 0; i < width; ++i) {
      total[i].*first += s[i];
      total[i].*second += q[i];
    }
  }
}

// As plane_moments: one pass around the mean of the first rows.
template <typename T>
static void row_moments(const RowRange& r, const T* x, Moments* out) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const T* base = x + r.column_begin;
  A shift[kMaxColumns + kLanes<A>];
  const int64_t rows = r.row_end - r.row_begin;
  const RowRange head{
      r.columns, r.column_begin, r.column_end, r.row_begin, rows < kRowBlock ? r.row_end : r.row_begin + kRowBlock / 4};
  sum_rows<A>(
      head, &Moments::mean, &Moments::m2, out, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>&) {
        s += keep(load(base + row * r.columns + i, lanes), lanes);
      });
  const double head_rows = double(head.row_end - head.row_begin);
  for (int64_t i = 0; i < width; ++i) shift[i] = finite_or_zero(A(out[i].mean / head_rows));
  for (int64_t i = width; i < width + kLanes<A>; ++i) shift[i] = 0;

  sum_rows<A>(
      r, &Moments::mean, &Moments::m2, out, [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>& q) {
        const Vec<A> d = keep(load(base + row * r.columns + i, lanes) - load_vector(shift + i), lanes);
        s += d;
        q += d * d;
      });
  for (int64_t i = 0; i < width; ++i) {
    out[i] = moments_around(double(shift[i]), out[i].mean, out[i].m2, double(rows));
  }
}

template <typename T>
static void row_apply(const RowRange& r, const T* x, bool x_repeats, const ApplyCoefficients<acc_t<T>>& k, T* y) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const int64_t c = r.column_begin;
  for_each_rows(r.row_begin, r.row_end, [&](int64_t row, auto rows) {
    for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
      const Vec<A> mean = load(k.mean + c + i, lanes);
      const Vec<A> scale = load(k.scale + c + i, lanes);
      const Vec<A> shift = load(k.offset + c + i, lanes);
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t offset = (row + j) * r.columns + c + i;
        const T* px = x_repeats ? x + i : x + offset;
        store(y + offset, (load(px, lanes) - mean) * scale + shift, lanes);
      }
    });
  });
}

template <typename T>
static void row_grad_sums(
    const RowRange& r, const T* dy, bool dy_repeats, const T* x, const acc_t<T>* mean, GradSums* out) {
  using A = acc_t<T>;
  const T* x_base = x + r.column_begin;
  sum_rows<A>(r,
              &GradSums::dy,
              &GradSums::dy_centred,
              out,
              [&](int64_t row, int64_t i, const auto& lanes, Vec<A>& s, Vec<A>& q) {
                const Vec<A> g = load(dy_repeats ? dy + i : dy + row * r.columns + r.column_begin + i, lanes);
                s += keep(g, lanes);
                const Vec<A> centred =
                    load(x_base + row * r.columns + i, lanes) - load(mean + r.column_begin + i, lanes);
                q += keep(g * centred, lanes);
              });
}

template <typename T>
static void row_grad_input(
    const RowRange& r, const T* dy, bool dy_repeats, const T* x, const GradCoefficients<acc_t<T>>& k, T* dx) {
  using A = acc_t<T>;
  const int64_t width = r.column_end - r.column_begin;
  const int64_t c = r.column_begin;
  for_each_rows(r.row_begin, r.row_end, [&](int64_t row, auto rows) {
    for_each_vector<A>(width, [&](int64_t i, const auto& lanes, int) {
      const Vec<A> mean = load(k.mean + c + i, lanes);
      const Vec<A> scale = load(k.scale + c + i, lanes);
      const Vec<A> slope = load(k.slope + c + i, lanes);
      const Vec<A> shift = load(k.offset + c + i, lanes);
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t offset = (row + j) * r.columns + c + i;
        const Vec<A> centred = load(x + offset, lanes) - mean;
        const Vec<A> g = load(dy_repeats ? dy + i : dy + offset, lanes);
        store(dx + offset, g * scale + (centred * slope + shift), lanes);
      }
    });
  });
}
