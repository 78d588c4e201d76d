// The interface of the kernels, a table of functions per instruction set: plain memory, one thread, no torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bn_ext::cpu {

// 16-bit floats in memory. Arithmetic on them is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of the arithmetic, and of mean, rstd and coefficients.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccumulateType<T>::type;

// A part of a contiguous (N, C, S) tensor: the channels [c_begin, c_end), and of each channel's N * S values, in memory
// order, the values [m_begin, m_end).
struct PlaneRange {
  int64_t c;
  int64_t s;
  int64_t c_begin;
  int64_t c_end;
  int64_t m_begin;
  int64_t m_end;
  int64_t ahead;  // prefetch distance in bytes; 0: no prefetch
};

// The part [row_begin, row_end) x [column_begin, column_end) of a contiguous (rows, columns) tensor. If whole rows are
// narrow, the vectors of coefficients are repeated for `coefficient_rows` rows.
struct RowRange {
  int64_t columns;
  int64_t column_begin;
  int64_t column_end;
  int64_t row_begin;
  int64_t row_end;
  int64_t run;  // adjacent columns of one channel; a range has whole runs
  int64_t coefficient_rows;
  bool sums_several;  // rows together
  int64_t ahead;      // as in PlaneRange

  int64_t runs() const { return (column_end - column_begin) / run; }
};

constexpr int64_t kPageBytes = 4096;  // prefetch distance: the page size of most systems

constexpr int64_t kMaxRun = 2048;      // adjacent values processed together: float sums stay short, buffers in L1
constexpr int64_t kFewValues = 512;    // of a channel: one vector sums them without losing digits
constexpr int64_t kMaxColumns = 1024;  // of a RowRange: the accumulators of one range stay in L1

// The mean, and the sum of squared deviations from it, of a set of values.
struct Moments {
  double mean;
  double m2;
};

// Returns moments from the sums of the deviations of `count` values from a shift, and of their squares.
inline Moments moments_around(double shift, double sum, double squares, double count) {
  const double distance = sum * (1 / count);  // one division for many channels
  const double m2 = squares - sum * distance;
  return {shift + distance, m2 < 0 ? 0 : m2};  // negative only by rounding; NaN stays NaN
}

// Whether the shift was so far from the mean that the squares around it have lost digits of m2, because the values that
// it was computed from were unlike the rest. The sums are then computed again, around the mean.
inline bool is_far(double shift, const Moments& moments, double count) {
  const double distance = moments.mean - shift;
  return count * distance * distance > 16 * moments.m2;
}

// sum(dy) and sum(dy * (x - mean)).
struct GradSums {
  double dy;
  double dy_centred;
};

// u = (x - mean) * scale + offset. The vectors are indexed by channel (planes) or by column (rows).
template <typename A>
struct Affine {
  const A* mean;
  const A* scale;
  const A* offset;
};

// x, y, dy ... point to whole tensors; a range selects a part.

// y = activation(u + z)
template <typename T>
struct ApplyArguments {
  const T* x;
  const T* z;  // null: none
  T* y;
  uint8_t* mask;  // zeroed; null: not wanted
  Activation activation;
  Affine<acc_t<T>> affine;
  bool streams;  // y is too large to stay in cache
};

// g = dy * activation'(u + z). Training: dx = g * scale + (x - mean) * slope + shift; eval: dx = g * scale
template <typename T>
struct GradArguments {
  const T* dy;
  bool dy_repeats;  // dy points to kMaxRun copies of a single value
  const T* x;
  const T* z;           // null: no residual, or not needed
  const uint8_t* mask;  // null: activation' is computed from u + z
  Activation activation;
  Affine<acc_t<T>> affine;
  bool training;
  const acc_t<T>* slope;  // indexed like affine
  const acc_t<T>* shift;
  T* dx;         // null: not wanted
  T* dz;         // null: not wanted
  bool streams;  // dx and dz are too large to stay in cache
};

// Sums are stored to out[channel - c_begin], or to out[i] for run i of the range's columns.
template <typename T, typename Range>
struct KernelsOf {
  void (*moments)(const Range& range, const T* x, Moments* out);
  void (*apply)(const Range& range, const ApplyArguments<T>& a);
  void (*grad_sums)(const Range& range, const GradArguments<T>& a, GradSums* out);
  void (*grad_input)(const Range& range, const GradArguments<T>& a);
};

template <typename T>
struct Kernels {
  KernelsOf<T, PlaneRange> planes;
  KernelsOf<T, RowRange> rows;
};

// One set of kernels per instruction set of this build. isa/ compiles the kernels of each type separately.
namespace baseline {
template <typename T>
Kernels<T> table();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
Kernels<T> table();
}
namespace avx512 {
template <typename T>
Kernels<T> table();
}
#endif

}  // namespace bn_ext::cpu
