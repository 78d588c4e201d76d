// How a tensor is cut into ranges for the kernels. The segments depend only on the shape, so that sums are bit-equal
// for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "kernels.h"

namespace bn_ext::cpu {

constexpr int64_t kPlaneSegment = 1 << 16;  // values of a channel in a segment, at most
constexpr int64_t kRowSegment = 1 << 18;    // values of a group of columns in a segment, at most
constexpr int64_t kRowUnits = 8;            // units of a sum over rows, at least, unless they are below kSummedValues
constexpr int64_t kSummedValues = 1 << 15;  // fewer values would take less time than the arithmetic per column
constexpr int64_t kUnitValues = 1 << 13;    // of a unit of a pass without sums, which works in memory order
constexpr int64_t kNarrowPlane = 16;        // planes of fewer values do not fill a vector
constexpr int64_t kManyImages = 16;         // from here on, coefficients per column are small beside the tensor
constexpr int64_t kManyColumns = 1 << 17;   // up to here, 20 bytes per column are small in any case
constexpr int64_t kNarrowRow = 64;          // channels_last rows of fewer values are joined with their neighbours
constexpr int64_t kFewColumns = 128;        // a row this narrow ends before the prefetchers detect it
constexpr int64_t kRunBytes = 512;          // of narrow rows whose results are written together
constexpr int64_t kSmallBytes = 8 << 20;    // of a tensor: above, several rows at a time are several memory streams
constexpr int64_t kGroupBytes = 4096;       // of a group of planes in one image: enough for the prefetchers
constexpr int64_t kLeastGroupBytes = 12 << 10;  // of a group in all images, at least; a larger group would leave L1
constexpr int64_t kFetchedBytes = 2 << 20;      // of a group that is prefetched during another's results
constexpr int64_t kMaxGroup = 64;               // channels of a group of planes that is summed, at most
constexpr int64_t kCachedBytes = 1 << 20;       // a group up to this size stays in cache until it is read again

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The common part of both cuts. A group holds whole channels, and a segment holds a part of their values. Kernels are
// called for a unit, a group's part of a segment. Coefficients are indexed by column, sums by run of adjacent columns.
// Run i belongs to channel i % channels.
struct Partition {
  int64_t channels;
  int64_t columns;
  int64_t run;
  int64_t groups;
  int64_t segments;
  bool cached;               // a group's values stay in cache between its sums and its results
  bool joined;               // rows are joined, so a row has several runs of each channel; then there is one group
  int64_t coefficient_rows;  // number of copies of the coefficients of all columns

  int64_t runs() const { return columns / run; }
};

// Contiguous (N, C, S). A column is a channel.
struct PlanePartition : Partition {
  using Range = PlaneRange;
  Shape shape;
  int64_t group_channels;
  int64_t segment_values;
  int64_t group_ahead;  // bytes from a group's values to those of the next group
  bool fetches;

  PlanePartition(const Shape& shape, int64_t item_bytes, bool has_sums, bool fetches) : shape(shape), fetches(fetches) {
    const int64_t values = shape.values_per_channel();
    channels = columns = shape.c;
    run = 1;
    if (has_sums) {
      const int64_t wanted = ceil_div(std::max(kGroupBytes, kLeastGroupBytes / shape.n), shape.s * item_bytes);
      const int64_t cacheable = kCachedBytes / (values * item_bytes);
      group_channels = std::clamp<int64_t>(std::min({wanted, cacheable, shape.c / 16}), 1, kMaxGroup);
      segments = ceil_div(values, kPlaneSegment);
      segment_values = ceil_div(values, segments);
      const bool stays_in_cache = group_channels * values * item_bytes <= kFetchedBytes;
      group_ahead = stays_in_cache ? group_channels * shape.s * item_bytes : kPageBytes;
    } else {  // an image's adjacent channels, or whole images
      group_channels = std::clamp<int64_t>(kUnitValues / shape.s, 1, shape.c);
      const int64_t images = std::max<int64_t>(kUnitValues / (group_channels * shape.s), 1);
      segment_values = std::min(images * shape.s, kPlaneSegment);
      segments = ceil_div(values, segment_values);
      group_ahead = kPageBytes;
    }
    groups = ceil_div(channels, group_channels);
    cached = true;  // at worst in the last-level cache
    joined = false;
    coefficient_rows = 1;
  }

  int64_t column_begin(int64_t group) const { return group * group_channels; }
  int64_t column_end(int64_t group) const { return std::min(columns, column_begin(group) + group_channels); }
  int64_t count(int64_t segment) const {  // values of a run in a segment
    return std::min(shape.values_per_channel(), (segment + 1) * segment_values) - segment * segment_values;
  }
  // by_group: the next group's sums follow this group's results.
  Range range(int64_t group, int64_t segment, bool by_group) const {
    const int64_t begin = segment * segment_values;
    const int64_t ahead = !fetches ? 0 : by_group ? group_ahead : kPageBytes;
    return {shape.c, shape.s, column_begin(group), column_end(group), begin, begin + count(segment), ahead};
  }
};

// Rows of columns: channels_last, (N, C), and contiguous tensors of small planes.
struct RowPartition : Partition {
  using Range = RowRange;
  int64_t rows;
  int64_t group_columns;
  int64_t segment_rows;
  bool sums_several;
  int64_t ahead;

  RowPartition(const Shape& shape, int64_t item_bytes, bool has_sums, bool fetches) {
    channels = shape.c;
    run = shape.channels_last ? 1 : shape.s;
    columns = shape.channels_last ? shape.c : shape.c * shape.s;
    rows = shape.numel() / columns;
    const int64_t rows_joined = columns < kNarrowRow ? largest_divisor(rows, ceil_div(kNarrowRow, columns)) : 1;
    columns *= rows_joined;
    rows /= rows_joined;
    joined = rows_joined > 1;
    const int64_t widest = std::max(run, (has_sums ? kMaxColumns : 2 * kMaxColumns) / run * run);  // whole channels
    group_columns = joined ? columns : std::min(columns, widest);
    groups = ceil_div(columns, group_columns);
    const int64_t segment_values =
        has_sums ? std::clamp(shape.numel() / kRowUnits, kSummedValues, kRowSegment) : kUnitValues;
    segments = ceil_div(rows * group_columns, segment_values);
    segment_rows = ceil_div(rows, segments);
    segments = ceil_div(rows, segment_rows);
    cached = rows * group_columns * item_bytes <= kCachedBytes;
    coefficient_rows = groups == 1 ? std::clamp<int64_t>(kRunBytes / (columns * item_bytes), 1, rows) : 1;
    sums_several = columns <= kFewColumns || rows * columns * item_bytes <= kSmallBytes;
    const int64_t later_row = 2 * columns * item_bytes;  // the same columns, two rows later
    ahead = !fetches ? 0 : groups == 1 ? kPageBytes : later_row;
  }

  int64_t column_begin(int64_t group) const { return group * group_columns; }
  int64_t column_end(int64_t group) const { return std::min(columns, column_begin(group) + group_columns); }
  int64_t row_end(int64_t segment) const { return std::min(rows, (segment + 1) * segment_rows); }
  int64_t count(int64_t segment) const { return (row_end(segment) - segment * segment_rows) * run; }
  Range range(int64_t group, int64_t segment, bool /*by_group*/) const {
    const int64_t begin = segment * segment_rows;
    return {columns,
            column_begin(group),
            column_end(group),
            begin,
            row_end(segment),
            run,
            coefficient_rows,
            sums_several,
            ahead};
  }

 private:
  static int64_t largest_divisor(int64_t value, int64_t at_most) {
    int64_t divisor = at_most;
    while (value % divisor != 0) --divisor;
    return divisor;
  }
};

// Small planes are processed as rows if there are enough images to make up for the work and the memory per column;
// larger planes need more images. Planes that do not fill a vector are also processed as rows if that memory is small.
inline bool walks_rows(const Shape& shape, bool has_sums) {
  if (shape.channels_last) return true;
  const bool many = shape.n >= kManyImages;
  if (shape.s < kNarrowPlane) return many || shape.c * shape.s <= kManyColumns;
  return many && has_sums && shape.s < (shape.n >= 4 * kManyImages ? 8 : 4) * kNarrowPlane;
}

}  // namespace bn_ext::cpu
