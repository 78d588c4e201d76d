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
  return {pair.value(0), pair.value(1)};
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

// Calls body(i, get(i)) for a lane's share of the parts, in order; some are asked for before the first is waited for.
template <typename Get, typename Body>
__device__ void for_parts(const Group& group, int64_t parts, const Get& get, const Body& body) {
  constexpr int kAtATime = 4;
  for (int64_t i = group.lane; i < parts; i += kAtATime * group.lanes) {
    decltype(get(i)) some[kAtATime] = {};
#pragma unroll
    for (int k = 0; k < kAtATime; ++k) {
      if (i + k * group.lanes < parts) some[k] = get(i + k * group.lanes);
    }
#pragma unroll
    for (int k = 0; k < kAtATime; ++k) {
      if (i + k * group.lanes < parts) body(i + k * group.lanes, some[k]);
    }
  }
}

// Merges get(0) ... get(parts - 1), of count_of(i) values each, `count` in all: means taken from the first one's, so
// that a large one does not cancel, and squares that make up for the distance from the common mean (Chan, Golub and
// LeVeque 1979, for all parts at once).
template <typename Get, typename CountOf>
__device__ Moments merge(const Group& group, int64_t parts, const Get& get, const CountOf& count_of, double count) {
  const double first_mean = parts > 0 ? get(0).mean : 0;
  double sum = 0;
  for_parts(group, parts, get, [&](int64_t i, const Moments& part) { sum += count_of(i) * (part.mean - first_mean); });
  const double mean = first_mean + group.sum(sum) / count;
  double m2 = 0;
  for_parts(group, parts, get, [&](int64_t i, const Moments& part) {
    const double delta = part.mean - mean;
    m2 += part.m2 + count_of(i) * (delta * delta);
  });
  return {mean, group.sum(m2)};
}

template <typename Get>
__device__ GradSums merge(const Group& group, int64_t parts, const Get& get) {
  GradSums total = {0, 0};
  for_parts(group, parts, get, [&](int64_t, const GradSums& part) {
    total.dy += part.dy;
    total.dy_centred += part.dy_centred;
  });
  return {group.sum(total.dy), group.sum(total.dy_centred)};
}

// The sums of a thread's values, of equally many each, `count`, in one.
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

// Adds b to a, of `a_count` values; `b_share`: of all values, those of b.
inline __device__ void add_sums(Moments& a, const Moments& b, double a_count, double b_share) {
  if (b_share == 0) return;
  const double delta = b.mean - a.mean;
  a.mean += delta * b_share;
  a.m2 += b.m2 + delta * (delta * (a_count * b_share));
}
inline __device__ void add_sums(GradSums& a, const GradSums& b, double, double) {
  a.dy += b.dy;
  a.dy_centred += b.dy_centred;
}

inline __device__ Moments shuffle_xor(const Moments& m, int distance) {
  return {__shfl_xor_sync(kAllLanes, m.mean, distance), __shfl_xor_sync(kAllLanes, m.m2, distance)};
}
inline __device__ GradSums shuffle_xor(const GradSums& s, int distance) {
  return {__shfl_xor_sync(kAllLanes, s.dy, distance), __shfl_xor_sync(kAllLanes, s.dy_centred, distance)};
}

// Merges the sums of a warp's threads that stand behind each other, of `count` values each; the first one gets the
// result. All threads of the warp must call this.
template <typename Sums, int kCount>
__device__ void merge_in_warp(const Plan& plan, Sums (&sums)[kCount], int count) {
  for (int rows = 1; rows < plan.warp_rows; rows *= 2) {
    const int distance = rows * plan.columns;
    const int other_count = __shfl_xor_sync(kAllLanes, count, distance);
    const double other_share = other_count == 0 ? 0 : double(other_count) / (count + other_count);
#pragma unroll
    for (Sums& own : sums) add_sums(own, shuffle_xor(own, distance), count, other_share);
    count += other_count;
  }
}

// Leaves a thread's sums, one for each value of its vectors or for all of them, where merge_block looks for them: those
// of adjacent values of a channel as one. All threads of the block must call this.
template <int kVector, bool kOneChannel, typename Walk, typename Sums, int kCount>
__device__ void leave_sums(const Plan& plan, const Walk& walk, Sums (&sums)[kCount]) {
  const auto place = [&] {
    return shared_memory<Sums>() + walk.row_lane / plan.warp_rows * plan.partials_stride() +
           walk.column * plan.pieces_stride();
  };
  const auto leaves = [&] { return walk.row_lane < plan.row_lanes && walk.row_lane % plan.warp_rows == 0; };
  if constexpr (kOneChannel) {
    Sums total[1] = {merge_own(sums, walk.rows)};
    merge_in_warp(plan, total, walk.rows * kVector);
    if (leaves()) *place() = total[0];
  } else {
    merge_in_warp(plan, sums, walk.rows);
    if (!leaves()) return;
    Sums* left = place();
    Sums piece = sums[0];
    int count = 1;
    int position = walk.column * kVector % plan.row_values;
#pragma unroll
    for (int i = 1; i < kVector; ++i) {
      if (++position < plan.row_values) {
        add_sums(piece, sums[i], count * walk.rows, 1.0 / (count + 1));
        ++count;
      } else {
        *left++ = piece;
        piece = sums[i];
        count = 1;
        position = 0;
      }
    }
    *left = piece;
  }
}

// What threads have left of a channel of the block's slice: of some adjacent vectors in each row, those of their values
// that are the channel's.
class Parts {
 public:
  __device__ Parts(const Plan& plan, int place)
      : plan_(plan),
        place_(place),
        first_value_(place * plan.row_values),
        first_vector_(first_value_ / plan.vector),
        vectors_((first_value_ + plan.row_values - 1) / plan.vector - first_vector_ + 1) {}

  __device__ int count() const { return plan_.partial_rows() * vectors_; }
  // The i-th part: the row of threads it begins with, where it is, how many values of each row it is of.
  __device__ int row_lane(int i) const { return i / vectors_ * plan_.warp_rows; }
  __device__ int index(int i) const {
    const int vector = first_vector_ + i % vectors_;
    const int piece = place_ - vector * plan_.vector / plan_.row_values;
    return i / vectors_ * plan_.partials_stride() + vector * plan_.pieces_stride() + piece;
  }
  __device__ int values(int i) const {
    const int vector_begin = (first_vector_ + i % vectors_) * plan_.vector;
    const int end = min(first_value_ + plan_.row_values, vector_begin + plan_.vector);
    return end - max(first_value_, vector_begin);
  }

 private:
  const Plan& plan_;
  int place_;
  int first_value_;
  int first_vector_;
  int vectors_;
};

// A channel of a slice, which a group of threads merges the sums of; there may be none.
struct Channel {
  Group group;
  int place;  // in the slice
  int64_t index;
  bool exists;

  __device__ bool is_first() const { return exists && group.lane == 0; }
};

// Calls body(channel), by groups of `lanes` threads, for the slice's channels at first, first + step ... All threads of
// the block must call this, and stay in the body until its end: the warps merge together.
template <typename Body>
__device__ void for_channels(const Plan& plan, int64_t slice, int lanes, int first, int step, const Body& body) {
  const Group group(lanes);
  const int group_number = static_cast<int>(threadIdx.x) / lanes;
  for (; first < plan.slice_channels; first += plan.threads / lanes * step) {
    const int place = first + group_number * step;
    const int64_t index = slice * plan.slice_channels + place;
    body(Channel{group, place, index, place < plan.slice_channels && index < plan.channels});
  }
}

// Merges by channel what all threads have left, and calls finish(total, channel, its place in the slice), by one thread
// per channel. merge_channel(group, count, get, parts) merges get(0) ... get(count - 1); a group may have no channel,
// and then a count of 0.
template <typename Sums, typename MergeChannel, typename Finish>
__device__ void merge_block(const Plan& plan,
                            const Block& block,
                            const MergeChannel& merge_channel,
                            const Finish& finish) {
  __syncthreads();
  const Sums* sums = shared_memory<Sums>();
  for_channels(plan, block.slice, plan.merge_lanes, 0, 1, [&](const Channel& channel) {
    const Parts parts(plan, channel.place);
    const auto get = [&](int64_t i) { return sums[parts.index(static_cast<int>(i))]; };
    const Sums total = merge_channel(channel.group, channel.exists ? parts.count() : 0, get, parts);
    if (channel.is_first()) finish(total, channel.index, channel.place);
  });
}

// Where a block leaves its sums of a channel for another kernel.
template <typename Sums>
__device__ Sums* place_of(const Plan& plan, const Block& block, Sums* partials, int64_t channel) {
  return partials + channel * plan.segments + block.segment;
}

}  // namespace bn_ext::cuda
