// From the sums of segments and columns to those of channels, in double and in a fixed order.
#pragma once

#include <vector>

#include "kernels.h"
#include "partition.h"

namespace bn_ext::cpu {

// Sums of every segment: at(segment)[column].
template <typename Sums>
class Partials {
 public:
  Partials(const Partition& partition, bool needed)
      : columns_(partition.columns), values_(needed ? columns_ * partition.segments : 0) {}
  Sums* at(int64_t segment) { return values_.data() + segment * columns_; }

 private:
  int64_t columns_;
  std::vector<Sums> values_;
};

// Calls body(column) for the columns of a channel.
template <typename Body>
void for_each_column(const Partition& p, int64_t c, const Body& body) {
  for (int64_t block = c * p.run; block < p.columns; block += p.channels * p.run) {
    for (int64_t column = block; column < block + p.run; ++column) body(column);
  }
}

// Calls body(i) for the places of a channel's coefficients.
template <typename Body>
void for_each_coefficient(const Partition& p, int64_t c, const Body& body) {
  for_each_column(p, c, [&](int64_t column) {
    for (int64_t row = 0; row < p.coefficient_rows; ++row) body(row * p.columns + column);
  });
}

// Moments merge as means about the common mean, and squares that make up for the distance from it (Chan, Golub and
// LeVeque 1979, for all parts at once).

// Merges the segments of the columns [begin, end) into the first segment's place. Returns the values per column.
template <typename P>
double merge_segments(const P& partition, int64_t begin, int64_t end, Partials<Moments>& partials) {
  std::vector<double> mean(static_cast<size_t>(end - begin));
  double count = 0;
  for (int64_t segment = 0; segment < partition.segments; ++segment) count += double(partition.count(segment));
  if (partition.segments == 1) return count;
  for (int64_t segment = 0; segment < partition.segments; ++segment) {
    const Moments* m = partials.at(segment) + begin;
    const double weight = double(partition.count(segment)) / count;
    for (int64_t i = 0; i < end - begin; ++i) mean[i] += weight * m[i].mean;
  }
  Moments* total = partials.at(0) + begin;
  for (int64_t segment = 0; segment < partition.segments; ++segment) {
    const Moments* m = partials.at(segment) + begin;
    const double n = double(partition.count(segment));
    for (int64_t i = 0; i < end - begin; ++i) {
      const double delta = m[i].mean - mean[i];
      total[i].m2 = (segment == 0 ? 0 : total[i].m2) + (m[i].m2 + n * (delta * delta));
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) total[i].mean = mean[i];
  return count;
}

// A channel's moments from those of its columns, each of `count` values.
inline Moments merge_columns(const Partition& partition, int64_t c, double count, const Moments* columns) {
  double sum = 0;
  for_each_column(partition, c, [&](int64_t column) { sum += columns[column].mean; });
  const double mean = sum / double(partition.columns / partition.channels);
  double m2 = 0;
  for_each_column(partition, c, [&](int64_t column) {
    const double delta = columns[column].mean - mean;
    m2 += columns[column].m2 + count * (delta * delta);
  });
  return {mean, m2};
}

inline void merge_segments(const Partition& partition, int64_t begin, int64_t end, Partials<GradSums>& partials) {
  GradSums* total = partials.at(0);
  for (int64_t segment = 1; segment < partition.segments; ++segment) {
    const GradSums* sums = partials.at(segment);
    for (int64_t i = begin; i < end; ++i) {
      total[i].dy += sums[i].dy;
      total[i].dy_centred += sums[i].dy_centred;
    }
  }
}

// The columns of the channels [begin, end), which are adjacent, unless rows are joined: then all must be asked for.
inline int64_t columns_begin(const Partition& p, int64_t c_begin) { return c_begin * p.run; }
inline int64_t columns_end(const Partition& p, int64_t c_end) {
  return c_end == p.channels ? p.columns : c_end * p.run;
}

}  // namespace bn_ext::cpu
