// Partial sums: what they are, and how groups of threads merge them, in a fixed order.
#pragma once

#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Mean and sum of squared deviations from it, of a number of values that the plan tells.
struct Moments {
  double mean;
  double m2;
};

struct GradSums {
  double dy;          // sum(dy)
  double dy_centred;  // sum(dy * (x - mean))
};

// Sums in global memory, which an earlier kernel or another block wrote.
template <typename Sums>
__device__ Sums load_sums(const Sums* p) {
  using V = Vector<double, 2>;
  static_assert(sizeof(Sums) == sizeof(V), "two doubles, moved at once");
  const V pair = load<2>(reinterpret_cast<const double*>(p));
  return {pair.values[0], pair.values[1]};
}

inline __device__ void store_sums(Moments* p, const Moments& m) {
  store_pair(reinterpret_cast<double*>(p), m.mean, m.m2);
}
inline __device__ void store_sums(GradSums* p, const GradSums& s) {
  store_pair(reinterpret_cast<double*>(p), s.dy, s.dy_centred);
}

// Adjacent threads of a warp that merge together: `lanes` of them, a power of two. All threads of the warp must call
// these functions together; every lane of a group gets the result.
struct Group {
  int lanes;
  int lane;

  explicit __device__ Group(int lanes) : lanes(lanes), lane(static_cast<int>(threadIdx.x) % lanes) {}

  __device__ double sum(double value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
};

// Merges get(0) ... get(parts - 1), of count_of(i) values each, `count` in all: means taken from the first one's, so
// that a large one does not cancel, and squares that make up for the distance from the common mean (Chan, Golub and
// LeVeque 1979, for all parts at once).
template <typename Get, typename CountOf>
__device__ Moments merge(const Group& group, int64_t parts, const Get& get, const CountOf& count_of, double count) {
  const double first_mean = parts > 0 ? get(0).mean : 0;
  double sum = 0;
  for (int64_t i = group.lane; i < parts; i += group.lanes) sum += count_of(i) * (get(i).mean - first_mean);
  const double mean = first_mean + group.sum(sum) / count;
  double m2 = 0;
  for (int64_t i = group.lane; i < parts; i += group.lanes) {
    const Moments part = get(i);
    const double delta = part.mean - mean;
    m2 += part.m2 + count_of(i) * (delta * delta);
  }
  return {mean, group.sum(m2)};
}

template <typename Get>
__device__ GradSums merge(const Group& group, int64_t parts, const Get& get) {
  GradSums total = {0, 0};
  for (int64_t i = group.lane; i < parts; i += group.lanes) {
    const GradSums part = get(i);
    total.dy += part.dy;
    total.dy_centred += part.dy_centred;
  }
  return {group.sum(total.dy), group.sum(total.dy_centred)};
}

// The sums of one thread's vectors, of equally many values each, `count`, in one.
template <int kCount>
__device__ Moments merge_own(const Moments (&parts)[kCount], double count) {
  Moments total = {0, 0};
#pragma unroll
  for (const Moments& part : parts) total.mean += part.mean / kCount;
#pragma unroll
  for (const Moments& part : parts) {
    const double delta = part.mean - total.mean;
    total.m2 += part.m2 + count * (delta * delta);
  }
  return total;
}

template <int kCount>
__device__ GradSums merge_own(const GradSums (&parts)[kCount], double) {
  GradSums total = {0, 0};
#pragma unroll
  for (const GradSums& part : parts) {
    total.dy += part.dy;
    total.dy_centred += part.dy_centred;
  }
  return total;
}

// Leaves a thread's sums, one for each value of its vectors, where merge_block looks for them. A gap behind those of
// each thread and each row keeps threads that read or write at a time out of each other's memory banks.
template <bool kOneChannel, typename Sums, int kVector>
__device__ void leave_sums(const Plan& plan, const Walk<false>& walk, const Sums (&sums)[kVector]) {
  if (walk.row_lane >= plan.row_lanes) return;
  Sums* row = shared_memory<Sums>() + walk.row_lane * plan.partials_stride();
  if constexpr (kOneChannel) {
    row[walk.column] = merge_own(sums, walk.rows);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) row[walk.column * (kVector + 1) + i] = sums[i];
  }
}

// Merges by channel what all threads have left, and calls finish(total, channel, its place in the slice), by one thread
// per channel.
// merge_channel(group, channel, parts, get) merges get(0) ... get(parts - 1); part i is of row lane
// i / partials_per_row. A group may have no channel, and then no parts.
template <typename Sums, typename MergeChannel, typename Finish>
__device__ void merge_block(const Plan& plan,
                            const Block& block,
                            const MergeChannel& merge_channel,
                            const Finish& finish) {
  __syncthreads();
  const Sums* sums = shared_memory<Sums>();
  const Group group(plan.merge_lanes);
  const int per_row = plan.partials_per_row;
  // All threads stay in the loop until its end: the warps merge together.
  for (int first = 0; first < plan.slice_channels; first += plan.threads / group.lanes) {
    const int in_slice = first + static_cast<int>(threadIdx.x) / group.lanes;
    const int64_t channel = block.slice * plan.slice_channels + in_slice;
    const bool exists = in_slice < plan.slice_channels && channel < plan.channels;
    const auto get = [&](int64_t i) {
      const int row_lane = static_cast<int>(i) / per_row;
      const int value = in_slice * per_row + static_cast<int>(i) % per_row;
      const int gaps = plan.one_channel ? 0 : value / plan.vector;
      return sums[row_lane * plan.partials_stride() + value + gaps];
    };
    const Sums total = merge_channel(group, channel, exists ? plan.row_lanes * per_row : 0, get);
    if (exists && group.lane == 0) finish(total, channel, in_slice);
  }
}

// Where a block leaves its sums of a channel for another kernel.
template <typename Sums>
__device__ Sums* place_of(const Plan& plan, const Block& block, Sums* partials, int64_t channel) {
  return partials + channel * plan.segments + block.segment;
}

}  // namespace bn_ext::cuda
