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

// Moments of two disjoint sets of na and nb values together (Chan, Golub and LeVeque 1979).
inline Moments merged(const Moments& a, double na, const Moments& b, double nb) {
  const double n = na + nb;
  const double delta = b.mean - a.mean;
  return {(a.mean * na + b.mean * nb) / n, a.m2 + b.m2 + delta * delta * (na * nb / n)};
}

// Merges the segments of the columns [begin, end) into the first segment's place. The same as `merged` for all
// segments at once, which needs no division in the loop. Returns the number of values of a column.
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

// Calls body(column) for the columns of a channel.
template <typename Body>
void for_each_column(const Partition& p, int64_t c, const Body& body) {
  for (int64_t block = c * p.run; block < p.columns; block += p.channels * p.run) {
    for (int64_t column = block; column < block + p.run; ++column) body(column);
  }
}

// The columns of the channels [begin, end), which are adjacent, unless rows are joined: then all must be asked for.
inline int64_t columns_begin(const Partition& p, int64_t c_begin) { return c_begin * p.run; }
inline int64_t columns_end(const Partition& p, int64_t c_end) {
  return c_end == p.channels ? p.columns : c_end * p.run;
}

}  // namespace bn_ext::cpu
