// Loops over (rows, columns) tensors. Each column belongs to one channel.
// Several rows are summed together, so that a column's accumulators are loaded once for all of them. A range has at
// most kMaxColumns columns, so that accumulators and coefficients stay in L1.
#include "planes.inl"

constexpr int64_t kRowBlock = 128;  // rows summed in the accumulate type before they are added in double
constexpr int64_t kRowsToSum = 8;   // rows summed together, if sums_several
// A channel's moments are taken around the mean of this many values, which are read twice. The mean of fewer values
// would be farther from the mean of all.
constexpr int64_t kValuesForShift = 16;

// Calls body(first row, number of rows) for [begin, end): at most kRowsToSum rows, or one row as a constant.
template <typename Body>
BN_EXT_INLINE void for_each_rows(const RowRange& r, int64_t begin, int64_t end, const Body& body) {
  if (r.sums_several) {
    for (int64_t row = begin; row < end; row += kRowsToSum) body(row, smaller(kRowsToSum, end - row));
  } else {
    for (int64_t row = begin; row < end; ++row) body(row, std::integral_constant<int64_t, 1>{});
  }
}

// Two sums per column, kept in double.
struct ColumnSums {
  double first[kMaxColumns];
  double second[kMaxColumns];
};

template <typename A>
BN_EXT_INLINE void add_to(A* sums, Vec<A> values) {
  store_vector(sums, load_vector(sums) + values);
}

template <typename A>
BN_EXT_INLINE void add_four(A* sums, const Vec<A> (&values)[4]) {
  constexpr int64_t L = kLanes<A>;
  add_to(sums, values[0]);
  add_to(sums + L, values[1]);
  add_to(sums + 2 * L, values[2]);
  add_to(sums + 3 * L, values[3]);
}

// For all rows and columns of the range, calls terms(row, column, lanes, k, s, q), which adds to the vectors s and q.
// Columns count from column_begin; k is the u of for_each_vector. Before each set of at most kRowsToSum rows, calls
// prepare(first row, number of rows).
template <typename A, typename Prepare, typename Terms>
BN_EXT_INLINE void sum_rows(const RowRange& r, ColumnSums& sums, const Prepare& prepare, const Terms& terms) {
  constexpr int64_t L = kLanes<A>;
  const int64_t width = r.column_end - r.column_begin;
  // Padded, because a vector at the last column may extend beyond it.
  A first[kMaxColumns + kLanes<A>];
  A second[kMaxColumns + kLanes<A>];
  for (int64_t i = 0; i < width; ++i) sums.first[i] = sums.second[i] = 0;
  for (int64_t begin = r.row_begin; begin < r.row_end; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < r.row_end ? begin + kRowBlock : r.row_end;
    __builtin_memset(first, 0, sizeof(A) * (width + kLanes<A>));
    __builtin_memset(second, 0, sizeof(A) * (width + kLanes<A>));
    for_each_rows(r, begin, end, [&](int64_t row, auto rows) BN_EXT_LAMBDA {
      prepare(row, int64_t(rows));
      int64_t i = 0;
      for (; i + 4 * L <= width; i += 4 * L) {
        Vec<A> s[4] = {};  // sums of these rows only: short sums round less
        Vec<A> q[4] = {};
        for (int64_t below = row; below < row + rows; ++below) {
          terms(below, i, AllLanes{}, 0, s[0], q[0]);
          terms(below, i + L, AllLanes{}, 1, s[1], q[1]);
          terms(below, i + 2 * L, AllLanes{}, 2, s[2], q[2]);
          terms(below, i + 3 * L, AllLanes{}, 3, s[3], q[3]);
        }
        add_four(first + i, s);
        add_four(second + i, q);
      }
      const auto add_vector = [&](int64_t j, const auto& lanes, int) BN_EXT_LAMBDA {
        Vec<A> s = {};
        Vec<A> q = {};
        for (int64_t below = row; below < row + rows; ++below) terms(below, j, lanes, 0, s, q);
        add_to(first + j, s);
        add_to(second + j, q);
      };
      for_each_vector<A>(width, add_vector, i);
    });
    for (int64_t i = 0; i < width; ++i) sums.first[i] += first[i];
    for (int64_t i = 0; i < width; ++i) sums.second[i] += second[i];
  }
}

template <typename A, typename Terms>
BN_EXT_INLINE void sum_rows(const RowRange& r, ColumnSums& sums, const Terms& terms) {
  sum_rows<A>(r, sums, [](int64_t, int64_t) {}, terms);
}

// Adds up the sums of each run of columns and stores them as the first elements.
static void add_runs(const RowRange& r, double* sums) {
  if (r.run == 1) return;
  for (int64_t i = 0; i < r.runs(); ++i) sums[i] = run_sum(sums + i * r.run, r.run);
}

// Expands one value per run, stored as the first elements, to one per column.
template <typename A>
BN_EXT_INLINE void repeat_runs(const RowRange& r, A* values) {
  if (r.run == 1) return;
  for (int64_t i = r.runs() - 1; i >= 0; --i) {
    const A value = values[i];
    for (int64_t k = 0; k < r.run; ++k) values[i * r.run + k] = value;
  }
}

// Like channel_moments, for each run, with one shift per column and kLanes more readable elements after the last shift.
// Returns whether a shift was too far from its mean.
template <typename T>
static bool row_moments_around(const RowRange& r, const T* x, const acc_t<T>* shift, Moments* out) {
  using A = acc_t<T>;
  const double count = double((r.row_end - r.row_begin) * r.run);
  ColumnSums sums;
  const auto add = [=, x = x + r.column_begin, columns = r.columns, ahead = r.ahead](
                       int64_t row, int64_t i, const auto& lanes, int k, Vec<A>& s, Vec<A>& q) BN_EXT_LAMBDA {
    fetch_ahead(x + row * columns + i, k, ahead);
    const Vec<A> d = keep<A>(load(x + row * columns + i, lanes) - load_vector(shift + i), lanes);
    s += d;
    q += d * d;
  };
  sum_rows<A>(r, sums, add);
  add_runs(r, sums.first);
  add_runs(r, sums.second);
  bool any_far = false;
  for (int64_t i = 0; i < r.runs(); ++i) {
    const double around = double(shift[i * r.run]);
    out[i] = moments_around(around, sums.first[i], sums.second[i], count);
    any_far |= is_far(around, out[i], count);
  }
  return any_far;
}

// Like plane_moments, around the mean of the first rows.
template <typename T>
static void row_moments(const RowRange& r, const T* x, Moments* out) {
  using A = acc_t<T>;
  const T* base = x + r.column_begin;
  A shift[kMaxColumns + kLanes<A>] = {};
  RowRange head = r;
  head.row_end = r.row_begin + smaller(r.row_end - r.row_begin, (kValuesForShift + r.run - 1) / r.run);
  ColumnSums sums;
  sum_rows<A>(head, sums, [&](int64_t row, int64_t i, const auto& lanes, int, Vec<A>& s, Vec<A>&) BN_EXT_LAMBDA {
    s += keep<A>(load(base + row * r.columns + i, lanes), lanes);
  });
  add_runs(head, sums.first);
  const double count = double((head.row_end - head.row_begin) * r.run);
  for (int64_t i = 0; i < r.runs(); ++i) shift[i] = finite_or_zero(A(sums.first[i] * (1 / count)));
  repeat_runs(r, shift);
  if (!row_moments_around(r, x, shift, out)) return;
  for (int64_t i = 0; i < r.runs(); ++i) shift[i] = finite_or_zero(A(out[i].mean));
  repeat_runs(r, shift);
  row_moments_around(r, x, shift, out);
}

// Returns a function u(i, lanes): u of the vector at index i in the part of a row that starts at x.
template <typename T>
BN_EXT_INLINE auto row_u(const Affine<acc_t<T>>& affine, const RowRange& r, const T* x) {
  using A = acc_t<T>;
  const A* mean = affine.mean + r.column_begin;
  const A* scale = affine.scale + r.column_begin;
  const A* offset = affine.offset + r.column_begin;
  return [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
    return affine_of<A>(load(x + i, lanes), load(mean + i, lanes), load(scale + i, lanes), load(offset + i, lanes));
  };
}

// Calls body(offset, length) in memory order, for each row's part or, if there are coefficients for several rows, for
// that many whole rows.
template <typename Body>
BN_EXT_INLINE void for_each_row_run(const RowRange& r, const Body& body) {
  for (int64_t row = r.row_begin; row < r.row_end; row += r.coefficient_rows) {
    const int64_t rows = smaller(r.coefficient_rows, r.row_end - row);
    body(row * r.columns + r.column_begin, (rows - 1) * r.columns + r.column_end - r.column_begin);
  }
}

template <typename T>
static void row_apply(const RowRange& r, const ApplyArguments<T>& a) {
  Buffer<acc_t<T>> b;
  with_form(a, [=, &b](auto form, auto has_residual) BN_EXT_LAMBDA {
    for_each_row_run(r, [&](int64_t offset, int64_t width) BN_EXT_LAMBDA {
      apply_run<form(), has_residual()>(a, r.ahead, offset, width, b, row_u(a.affine, r, a.x + offset));
    });
  });
  if (a.streams) end_of_stream();
}

// Returns the start of a row's part of dy.
template <typename T>
BN_EXT_INLINE const T* dy_of_row(const GradArguments<T>& a, int64_t offset) {
  return a.dy_repeats ? a.dy : a.dy + offset;
}

template <typename T>
static void row_grad_sums(const RowRange& r, const GradArguments<T>& a, GradSums* out) {
  using A = acc_t<T>;
  constexpr int64_t kStride = kMaxColumns + kLanes<A>;
  A derivatives[kRowsToSum * kStride];  // kBuffered
  const int64_t width = r.column_end - r.column_begin;
  const A* mean = a.affine.mean + r.column_begin;
  const int64_t ahead_of_dy = a.dy_repeats ? 0 : r.ahead;
  ColumnSums sums;
  with_form(a, [=, &sums, &derivatives](auto form) BN_EXT_LAMBDA {
    const auto prepare = [&](int64_t first, int64_t rows) BN_EXT_LAMBDA {
      if constexpr (form() != GradientForm::kBuffered) return;
      for (int64_t row = first; row < first + rows; ++row) {
        const int64_t offset = row * r.columns + r.column_begin;
        A* of_row = derivatives + row % kRowsToSum * kStride;
        differentiate_run(a, offset, width, of_row, row_u(a.affine, r, a.x + offset));
      }
    };
    sum_rows<A>(
        r, sums, prepare, [&](int64_t row, int64_t i, const auto& lanes, int k, Vec<A>& s, Vec<A>& q) BN_EXT_LAMBDA {
          const int64_t offset = row * r.columns + r.column_begin;
          const T* x = a.x + offset;
          const A* of_row = derivatives + row % kRowsToSum * kStride;
          const auto u_at = row_u(a.affine, r, x);
          const T* dy = dy_of_row(a, offset);
          fetch_ahead(x + i, k, r.ahead);
          fetch_ahead(dy + i, k, ahead_of_dy);
          const Vec<A> g = gradient_at<form()>(a, dy, offset, of_row, u_at, i, lanes);
          s += keep<A>(g, lanes);
          q += keep<A>(g * (load(x + i, lanes) - load(mean + i, lanes)), lanes);
        });
  });
  add_runs(r, sums.first);
  add_runs(r, sums.second);
  for (int64_t i = 0; i < r.runs(); ++i) out[i] = {sums.first[i], sums.second[i]};
}

template <typename T>
static void row_grad_input(const RowRange& r, const GradArguments<T>& a) {
  using A = acc_t<T>;
  const A* mean = a.affine.mean + r.column_begin;
  const A* scale = a.affine.scale + r.column_begin;
  const A* slope = a.slope + r.column_begin;
  const A* shift = a.shift + r.column_begin;
  Buffer<A> b;
  with_form(a, [&](auto form) BN_EXT_LAMBDA {
    with_outputs<form()>(a, [=, &b](auto has_dx, auto has_dz) BN_EXT_LAMBDA {
      for_each_row_run(r, [&](int64_t offset, int64_t width) BN_EXT_LAMBDA {
        const T* x = a.x + offset;
        const T* dy = dy_of_row(a, offset);
        const auto u_at = row_u(a.affine, r, x);
        if constexpr (form() == GradientForm::kBuffered) differentiate_run(a, offset, width, b.u, u_at);
        const auto gradient = [=, &a, u = b.u](int64_t i, const auto& lanes)
                                  BN_EXT_LAMBDA { return gradient_at<form()>(a, dy, offset, u, u_at, i, lanes); };
        const auto from_x = [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA {
          const Vec<A> centred = load(x + i, lanes) - load(mean + i, lanes);
          return multiply_add<A>(centred, load(slope + i, lanes), load(shift + i, lanes));
        };
        const auto scale_at = [=](int64_t i, const auto& lanes) BN_EXT_LAMBDA { return load(scale + i, lanes); };
        write_gradients<has_dx(), has_dz()>(a, r.ahead, offset, width, gradient, scale_at, from_x);
      });
    });
  });
  if (a.streams) end_of_stream();
}
