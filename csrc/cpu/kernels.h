// The loops that exist once per instruction set, as a table of functions: plain memory, one thread, no torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bn_ext::cpu {

// 16-bit floats as they lie in memory; arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that values are computed in, and that mean, rstd and coefficients have.
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

// A contiguous (N, C, S) tensor, the channels [c_begin, c_end), and of each channel's N * S values, in memory order,
// those at [m_begin, m_end).
struct PlaneRange {
  int64_t c;
  int64_t s;
  int64_t c_begin;
  int64_t c_end;
  int64_t m_begin;
  int64_t m_end;
  int64_t ahead;  // bytes from what is read to what is fetched meanwhile; 0: nothing is
};

// A contiguous (rows, columns) tensor, and of it the part [row_begin, row_end) x [column_begin, column_end). The
// coefficients of whole rows that are narrow are given for several of them, one after the other.
struct RowRange {
  int64_t columns;
  int64_t column_begin;
  int64_t column_end;
  int64_t row_begin;
  int64_t row_end;
  int64_t run;  // adjacent columns of one channel; a range has whole runs
  int64_t coefficient_rows;
  bool sums_several;  // rows at a time
  int64_t ahead;      // as of a PlaneRange

  int64_t runs() const { return (column_end - column_begin) / run; }
};

constexpr int64_t kPageBytes = 4096;  // how far ahead values are fetched: a page of most systems

constexpr int64_t kMaxRun = 2048;      // adjacent values that go together: float sums stay short, buffers in L1
constexpr int64_t kFewValues = 512;    // of a channel: they can do without several sums in float
constexpr int64_t kMaxColumns = 1024;  // of a RowRange: the accumulators of one range stay in L1

// Mean and sum of squared deviations from it, of a number of values that the range tells.
struct Moments {
  double mean;
  double m2;
};

// From the sums of `count` values' deviations from a shift, and of their squares.
inline Moments moments_around(double shift, double sum, double squares, double count) {
  const double distance = sum * (1 / count);  // of many channels, one division
  const double m2 = squares - sum * distance;
  return {shift + distance, m2 < 0 ? 0 : m2};  // below zero by rounding only; NaN stays
}

// Whether the shift was so far from the mean that the squares around it have lost digits of m2: the values it was taken
// from were not like the others. Then the sums are taken again, around the mean.
inline bool is_far(double shift, const Moments& moments, double count) {
  const double distance = moments.mean - shift;
  return count * distance * distance > 16 * moments.m2;
}

// sum(dy) and sum(dy * (x - mean)).
struct GradSums {
  double dy;
  double dy_centred;
};

// u = (x - mean) * scale + offset, one value of each per channel (planes) or column (rows), indexed by it.
template <typename A>
struct Affine {
  const A* mean;
  const A* scale;
  const A* offset;
};

// x, y, dy ... are bases of whole tensors, a range says which part.

// y = activation(u + z)
template <typename T>
struct ApplyArguments {
  const T* x;
  const T* z;  // null: none
  T* y;
  uint8_t* mask;  // zeroed; null: not wanted
  Activation activation;
  Affine<acc_t<T>> affine;
  bool streams;  // y is too large to be found in cache later
};

// g = dy * activation'(u + z). Training: dx = g * scale + (x - mean) * slope + shift; eval: dx = g * scale
template <typename T>
struct GradArguments {
  const T* dy;
  bool dy_repeats;  // dy is a single value, given as kMaxRun copies
  const T* x;
  const T* z;           // null: none, or not needed
  const uint8_t* mask;  // null: activation' is computed from u + z
  Activation activation;
  Affine<acc_t<T>> affine;
  bool training;
  const acc_t<T>* slope;  // indexed as affine
  const acc_t<T>* shift;
  T* dx;         // null: not wanted
  T* dz;         // null: not wanted
  bool streams;  // dx and dz are too large to be found in cache later
};

// Sums go to out[channel - c_begin], or out[i] for the range's run of columns i.
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

// One set of kernels per instruction set that this build holds; each type's is compiled by itself, from isa/.
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
