// Partial sums, and how groups of threads merge them in a fixed order.
#pragma once

#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// The mean and the sum of squared deviations from it. The plan determines the number of values.
struct Moments {
  double mean;
  double m2;
};

struct GradSums {
  double dy;          // sum(dy)
  double dy_centred;  // sum(dy * (x - mean))
};

// Loads sums that an earlier kernel wrote to global memory.
template <typename Sums>
__device__ Sums load_sums(const Sums* p) {
  using V = Vector<double, 2>;
  static_assert(sizeof(Sums) == sizeof(V), "Sums must be two doubles, which one access moves");
  const V pair = load<2>(reinterpret_cast<const double*>(p));
  return {pair.value(0), pair.value(1)};
}

inline __device__ void store_sums(Moments* p, const Moments& m) {
  store_pair(reinterpret_cast<double*>(p), m.mean, m.m2);
}
inline __device__ void store_sums(GradSums* p, const GradSums& s) {
  store_pair(reinterpret_cast<double*>(p), s.dy, s.dy_centred);
}

// A group of `lanes` adjacent threads of a warp, a power of two, that merge together. All threads of the warp must call
// these functions together; every lane of a group gets the result.
struct Group {
  int lanes;
  int lane;

  explicit __device__ Group(int lanes) : lanes(lanes), lane(static_cast<int>(threadIdx.x) % lanes) {}

  __device__ double sum(double value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
  // The first lane's value.
  __device__ double first(double value) const {
    return __shfl_sync(kAllLanes, value, static_cast<int>(threadIdx.x) % kWarpThreads - lane);
  }
};

// Merges partial sums into one total by additions only: means are relative to a pivot, the mean of one part, and
// squares are about it (Chan, Golub and LeVeque 1979). A second pass over the parts, about the resulting mean, avoids
// cancellation in the squares; it reuses parts that are still in registers.
template <typename Sums>
class Merging;

template <>
class Merging<Moments> {
 public:
  static constexpr bool kTwice = true;

  explicit __device__ Merging(double pivot) : pivot_(pivot) {}
  static __device__ double pivot_of(const Moments& part) { return part.mean; }

  // `count`: the number of the part's values, not zero.
  __device__ void add(const Moments& part, double count) {
    const double delta = part.mean - pivot_;
    sum_ = fma(count, delta, sum_);
    squares_ += fma(count * delta, delta, part.m2);
  }
  template <typename Sum>
  __device__ void add_up(const Sum& sum) {
    sum_ = sum(sum_);
    squares_ = sum(squares_);
  }
  // `share`: 1 / the number of all values.
  __device__ Moments total(double share) const {
    return {fma(sum_, share, pivot_), fma(-sum_, sum_ * share, squares_)};
  }

 private:
  double pivot_;
  double sum_ = 0;
  double squares_ = 0;
};

template <>
class Merging<GradSums> {
 public:
  static constexpr bool kTwice = false;

  explicit __device__ Merging(double) {}
  static __device__ double pivot_of(const GradSums&) { return 0; }

  __device__ void add(const GradSums& part, double) {
    total_.dy += part.dy;
    total_.dy_centred += part.dy_centred;
  }
  template <typename Sum>
  __device__ void add_up(const Sum& sum) {
    total_ = {sum(total_.dy), sum(total_.dy_centred)};
  }
  __device__ GradSums total(double) const { return total_; }

 private:
  GradSums total_ = {0, 0};
};

// Merges get(0) ... get(parts - 1), which have count_of(i) values; `share` is 1 / the number of all values. A thread
// loads kAtATime parts before it uses the first one. Every lane of the group gets the result.
template <int kAtATime = 4, typename Get, typename CountOf>
__device__ auto merge(const Group& group, int64_t parts, const Get& get, const CountOf& count_of, double share) {
  using Sums = decltype(get(0));
  Sums some[kAtATime] = {};
  const auto load_from = [&](int64_t first) {
#pragma unroll
    for (int k = 0; k < kAtATime; ++k) {
      if (first + k * group.lanes < parts) some[k] = get(first + k * group.lanes);
    }
  };
  load_from(group.lane);
  Merging<Sums> merging(group.first(Merging<Sums>::pivot_of(some[0])));
  const auto add_all = [&] {
    for (int64_t i = group.lane; i < parts; i += kAtATime * group.lanes) {
#pragma unroll
      for (int k = 0; k < kAtATime; ++k) {
        if (i + k * group.lanes < parts) merging.add(some[k], count_of(i + k * group.lanes));
      }
      load_from(i + kAtATime * group.lanes);
    }
    merging.add_up([&](double value) { return group.sum(value); });
  };
  add_all();
  Sums total = merging.total(share);
  if constexpr (Merging<Sums>::kTwice) {
    merging = Merging<Sums>(total.mean);
    if (parts > kAtATime * group.lanes) load_from(group.lane);  // otherwise registers still hold them
    add_all();
    total.m2 = merging.total(share).m2;
  }
  return total;
}

template <int kAtATime = 4, typename Get>
__device__ GradSums merge(const Group& group, int64_t parts, const Get& get) {
  return merge<kAtATime>(group, parts, get, [](int64_t) { return 1.0; }, 1.0);
}

// Merges sums of one thread, each of `count` values.
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

// Merges the sums of those threads of a warp that share a column; each thread's sums have `count` values. If any thread
// has values, the first one does. All threads of the warp must call this, and all get the result.
template <typename Sums, int kCount>
__device__ void merge_in_warp(const Plan& plan, Sums (&sums)[kCount], int count) {
  if (plan.warp_rows == 1) return;
  const auto sum = [&](auto value) {
    for (int rows = 1; rows < plan.warp_rows; rows *= 2) {
      value += __shfl_xor_sync(kAllLanes, value, rows * plan.columns);
    }
    return value;
  };
  const int all = sum(count);
  const double share = all == 0 ? 0 : 1.0 / all;
  const int first = static_cast<int>(threadIdx.x) % kWarpThreads % plan.columns;
#pragma unroll
  for (Sums& own : sums) {
    Merging<Sums> merging(__shfl_sync(kAllLanes, Merging<Sums>::pivot_of(own), first));
    if (count > 0) merging.add(own, count);
    merging.add_up(sum);
    Sums total = merging.total(share);
    if constexpr (Merging<Sums>::kTwice) {
      merging = Merging<Sums>(total.mean);
      if (count > 0) merging.add(own, count);
      merging.add_up(sum);
      total.m2 = merging.total(share).m2;
    }
    own = total;
  }
}

// Stores a thread's sums, one per value of its vectors, in shared memory for merge_block. Sums of adjacent values of
// one channel are merged first. All threads of the block must call this.
template <int kVector, bool kOneChannel, typename Walk, typename Sums, int kCount>
__device__ void store_partials(const Plan& plan, const Walk& walk, Sums (&sums)[kCount]) {
  const auto slot = [&] {
    return shared_memory<Sums>() + walk.row_lane / plan.warp_rows * plan.partials_stride() +
           walk.column * plan.pieces_stride();
  };
  const auto stores = [&] { return walk.row_lane < plan.row_lanes && walk.row_lane % plan.warp_rows == 0; };
  if constexpr (kOneChannel) {
    Sums total[1] = {merge_own(sums, walk.rows)};
    merge_in_warp(plan, total, walk.rows * kVector);
    if (stores()) *slot() = total[0];
  } else {
    merge_in_warp(plan, sums, walk.rows);
    if (!stores()) return;
    Sums* next = slot();
    if (plan.row_values == 1) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) next[i] = sums[i];
      return;
    }
    const auto begin = [&](const Sums& first) {
      Merging<Sums> piece(Merging<Sums>::pivot_of(first));
      piece.add(first, walk.rows);
      return piece;
    };
    const auto total = [&](const Merging<Sums>& piece, int count) {
      return piece.total(1.0 / max(1, count * walk.rows));
    };
    Merging<Sums> piece = begin(sums[0]);
    int count = 1;
    int position = walk.column * kVector % plan.row_values;
#pragma unroll
    for (int i = 1; i < kVector; ++i) {
      if (++position < plan.row_values) {
        piece.add(sums[i], walk.rows);
        ++count;
      } else {
        *next++ = total(piece, count);
        piece = begin(sums[i]);
        count = 1;
        position = 0;
      }
    }
    *next = total(piece, count);
  }
}

// The partial sums of one channel that the threads of a block have stored: for each row of partial sums, those of the
// adjacent vectors that contain values of the channel.
template <int kVector>
class Parts {
 public:
  __device__ Parts(const Plan& plan, int slot)
      : plan_(plan),
        slot_(slot),
        first_value_(slot * plan.row_values),
        first_vector_(first_value_ / kVector),
        vectors_((first_value_ + plan.row_values - 1) / kVector - first_vector_ + 1) {}

  __device__ int count() const { return plan_.partial_rows() * vectors_; }
  // For the i-th part: its first row of threads, its index in shared memory, and its number of values per row.
  __device__ int row_lane(int i) const { return row(i) * plan_.warp_rows; }
  __device__ int index(int i) const {
    const int piece = plan_.row_values == 1 ? slot_ % kVector : slot_ - vector(i) * kVector / plan_.row_values;
    return row(i) * plan_.partials_stride() + vector(i) * plan_.pieces_stride() + piece;
  }
  __device__ int values(int i) const {
    const int vector_begin = vector(i) * kVector;
    const int end = min(first_value_ + plan_.row_values, vector_begin + kVector);
    return end - max(first_value_, vector_begin);
  }

 private:
  // Usually a channel has one vector per row, which saves slow integer divisions.
  __device__ int row(int i) const { return vectors_ == 1 ? i : i / vectors_; }
  __device__ int vector(int i) const { return vectors_ == 1 ? first_vector_ : first_vector_ + i % vectors_; }

  const Plan& plan_;
  int slot_;
  int first_value_;
  int first_vector_;
  int vectors_;
};

// A channel of a slice whose sums a group of threads merges. It may not exist.
struct Channel {
  Group group;
  int slot;  // its index in the slice
  int64_t index;
  bool exists;

  __device__ bool is_first() const { return exists && group.lane == 0; }
};

// Calls body(channel) by groups of `lanes` threads for the channels of the slice in slots first, first + step ... All
// threads of the block must call this, and no thread may leave the body before a merge, which takes whole warps.
template <typename Body>
__device__ void for_channels(const Plan& plan, int64_t slice, int lanes, int first, int step, const Body& body) {
  const Group group(lanes);
  const int group_number = static_cast<int>(threadIdx.x) / lanes;
  for (; first < plan.slice_channels; first += plan.threads / lanes * step) {
    const int slot = first + group_number * step;
    const int64_t index = slice * plan.slice_channels + slot;
    body(Channel{group, slot, index, slot < plan.slice_channels && index < plan.channels});
  }
}

// Merges the partial sums of the block by channel. One thread per channel calls finish(total, channel, its slot in the
// slice). merge_channel(group, count, get, parts) merges get(0) ... get(count - 1); `count` is 0 for a group without a
// channel. All threads of the block must call this.
template <int kVector, typename Sums, typename MergeChannel, typename Finish>
__device__ void merge_block(const Plan& plan,
                            const Block& block,
                            const MergeChannel& merge_channel,
                            const Finish& finish) {
  __syncthreads();
  const Sums* sums = shared_memory<Sums>();
  for_channels(plan, block.slice, plan.merge_lanes, 0, 1, [&](const Channel& channel) {
    const Parts<kVector> parts(plan, channel.slot);
    const auto get = [&](int64_t i) { return sums[parts.index(static_cast<int>(i))]; };
    const Sums total = merge_channel(channel.group, channel.exists ? parts.count() : 0, get, parts);
    if (channel.is_first()) finish(total, channel.index, channel.slot);
  });
}

// The address at which a block stores its sums of a channel for another kernel.
template <typename Sums>
__device__ Sums* partial_slot(const Plan& plan, const Block& block, Sums* partials, int64_t channel) {
  return partials + channel * plan.segments + block.segment;
}

}  // namespace bn_ext::cuda
