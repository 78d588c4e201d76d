// Merges the sums of segments and of runs of columns into those of channels, in double and in a fixed order.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "partition.h"

namespace bn_ext::cpu {

// Sums for each segment and each run of columns, uninitialised: at(segment)[i], i < partition.runs().
template <typename Sums>
class Partials {
 public:
  Partials(const Partition& partition, bool needed)
      : runs_(partition.runs()),
        values_(needed ? new Sums[static_cast<size_t>(runs_ * partition.segments)] : nullptr) {}
  Sums* at(int64_t segment) { return values_.get() + segment * runs_; }

 private:
  int64_t runs_;
  std::unique_ptr<Sums[]> values_;
};

// Returns the end of the runs of the channels before c_end. If rows are joined, c_end must be the number of channels.
inline int64_t runs_end(const Partition& p, int64_t c_end) { return c_end == p.channels ? p.runs() : c_end; }

// The merged mean is the weighted mean of the parts' means. The merged m2 is the sum of m2 + count * (mean - merged
// mean)^2 over the parts (Chan, Golub and LeVeque 1979, for all parts at once).

// Merges the segments of the runs [begin, end) into the first segment's slots. Returns the number of values of a run.
template <typename P>
double merge_segments(const P& partition, int64_t begin, int64_t end, Partials<Moments>& partials) {
  double count = 0;
  for (int64_t segment = 0; segment < partition.segments; ++segment) count += double(partition.count(segment));
  if (partition.segments == 1) return count;
  std::vector<double> mean(static_cast<size_t>(end - begin));
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

// Merges a channel's runs, each of `count` values, into the slot of the first one.
inline void merge_runs(const Partition& partition, int64_t c, double count, Moments* runs) {
  double sum = 0;
  for (int64_t i = c; i < partition.runs(); i += partition.channels) sum += runs[i].mean;
  const double mean = sum / double(partition.runs() / partition.channels);
  double m2 = 0;
  for (int64_t i = c; i < partition.runs(); i += partition.channels) {
    const double delta = runs[i].mean - mean;
    m2 += runs[i].m2 + count * (delta * delta);
  }
  runs[c] = {mean, m2};
}

inline void add_to(GradSums& total, const GradSums& sums) {
  total.dy += sums.dy;
  total.dy_centred += sums.dy_centred;
}

inline void merge_segments(const Partition& partition, int64_t begin, int64_t end, Partials<GradSums>& partials) {
  for (int64_t segment = 1; segment < partition.segments; ++segment) {
    for (int64_t i = begin; i < end; ++i) add_to(partials.at(0)[i], partials.at(segment)[i]);
  }
}

inline void merge_runs(const Partition& partition, int64_t c, GradSums* runs) {
  for (int64_t i = c + partition.channels; i < partition.runs(); i += partition.channels) add_to(runs[c], runs[i]);
}

}  // namespace bn_ext::cpu
