// Statistics of a batch: partial moments, their merge, and the coefficients and running statistics from them.
#pragma once

#include "activation.cuh"
#include "merge.cuh"
#include "pass.cuh"

namespace bn_ext::cuda {

// 1 / b, with an error of at most one unit in the last place.
inline __device__ float reciprocal_of(float b) {
#ifdef __CUDACC__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return reciprocal;
#else
  return nextafterf(1 / b, 1);
#endif
}

// a / b of small whole numbers, in fewer instructions than a division. The fused multiply-adds correct the error of the
// reciprocal: with that error in a share, the variance would lose digits if the first values are unlike the rest.
inline __device__ float quotient_of(float a, float b) {
  const float reciprocal = reciprocal_of(b), quotient = a * reciprocal;
  return fmaf(fmaf(-quotient, b, a), reciprocal, quotient);
}
inline __device__ double quotient_of(double a, double b) { return a / b; }

// term(0) + ... + term(kCount - 1), in several independent chains of additions.
template <int kCount, typename Term>
__device__ auto sum_of(const Term& term) {
  constexpr int kChains = std::max(1, kCount / 8);
  decltype(term(0)) sums[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) sums[i] = term(i);
#pragma unroll
  for (int i = kChains; i < kCount; ++i) sums[i % kChains] += term(i);
#pragma unroll
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  return sums[0];
}

// Moments of a thread's values of one channel, updated chunk by chunk. The mean is the sum of two parts: deviations are
// taken from the larger part, which avoids cancellation if the mean is large, and `rest` holds its rounding error.
template <typename A>
struct StreamingMoments {
  A mean;
  A rest;  // rounding error of `mean`
  A m2;

  // `before`: the number of earlier values; `share`: the chunk's share of all values so far, itself included. Squares
  // are about the mean so far. The part that cancels in the chunk's own m2 is about as large as the term for the
  // distance of the means. It is larger only in the first chunk, about its first value: 2e-6 of m2 if only that value
  // is far off.
  template <int kCount>
  __device__ void add(const A (&values)[kCount], A before, A share) {
    // Deviations are divided by kCount so that their sum does not overflow; this is exact for a power of two.
    const A shift = mean / kCount;
    const auto part = [&](int i) { return values[i] * (A(1) / kCount) - shift; };
    const A chunk_mean = sum_of<kCount>(part);
    const A squares = sum_of<kCount>([&](int i) { return part(i) * part(i); });
    const A delta = chunk_mean - rest;
    m2 += (squares * kCount - chunk_mean * chunk_mean) * kCount;
    m2 += delta * (delta * (before * share));
    rest += delta * share;
    const A new_mean = mean + rest;
    rest += mean - new_mean;
    mean = new_mean;
  }
};

// The bytes and the number of the rows that are added at once. The fixed work of an addition is done for each state, so
// more rows are added at once if states are many. float64 has no registers for that.
template <typename T, int kStates>
constexpr int kAddedBytes = kStates * sizeof(T) == kWidestAccess && sizeof(T) < 8 ? 128 : 64;
template <typename T, int kVector, int kStates>
constexpr int kAddedRows = kChunkRows<Vector<T, kVector>, kAddedBytes<T, kStates>>;

// Adds a thread's rows, which next() returns in turn, to its moments until there are `rows`. There is one state for all
// values of a row if they belong to one channel, and one per value otherwise.
template <typename T, int kVector, typename Next, int kStates>
__device__ void add_rows(int rows,
                         const Next& next,
                         StreamingMoments<acc_t<T>> (&moments)[kStates],
                         int rows_before = 0) {
  using A = acc_t<T>;
  constexpr int kOfRow = kVector / kStates;
  in_chunks<kAddedRows<T, kVector, kStates>>(
      rows - rows_before,
      [&](auto count, int done) {
        constexpr int kRows = decltype(count)::value;
        Vector<T, kVector> chunk[kRows];
#pragma unroll
        for (Vector<T, kVector>& row : chunk) row = next();
        const A share = quotient_of(A(kRows), A(done + kRows));
#pragma unroll
        for (int state = 0; state < kStates; ++state) {
          A values[kRows * kOfRow];
#pragma unroll
          for (int i = 0; i < kRows * kOfRow; ++i) values[i] = chunk[i / kOfRow][state + i % kOfRow];
          if (done == 0) moments[state].mean = values[0];
          moments[state].add(values, A(done * kOfRow), share);
        }
      },
      rows_before);
}

// Merges the moments of all threads of a block by channel, and calls finish as merge_block does.
template <int kVector, bool kOneChannel, typename Walk, typename A, int kStates, typename Finish>
__device__ void merge_moments(const Plan& plan,
                              const Block& block,
                              const Walk& walk,
                              const StreamingMoments<A> (&moments)[kStates],
                              const Finish& finish) {
  Moments sums[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    sums[i] = {double(moments[i].mean) + double(moments[i].rest), double(moments[i].m2)};
  }
  store_partials<kVector, kOneChannel>(plan, walk, sums);
  const int segment_rows = plan.rows_of(block.segment);
  const double share = 1 / plan.values_of(block.segment);
  const auto merge_channel = [&](const Group& group, int count, const auto& get, const Parts<kVector>& parts) {
    const auto count_of = [&](int64_t i) {
      const int part = static_cast<int>(i);
      return double(rows_of_warp_lanes(plan, segment_rows, parts.row_lane(part))) * parts.values(part);
    };
    return merge(group, count, get, count_of, share);
  };
  merge_block<kVector, Moments>(plan, block, merge_channel, finish);
}

// One thread of the grid increments the count.
inline __device__ void count_batch(int64_t* num_batches_tracked) {
  if (num_batches_tracked == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  store_one(num_batches_tracked, load_one(num_batches_tracked) + 1);
}

// Moments of each segment: partials[channel * segments + segment]. Each thread sums its rows, each block its threads.
// Grid: one block per slice and segment. Reads x once. Increments the count, which finalise_statistics_kernel reads.
template <typename T, int kVector, bool kOneChannel>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    statistics_kernel(const Plan plan, const T* x, Moments* partials, int64_t* num_batches_tracked) {
  pdl_wait();
  const Block block = block_of(plan, blockIdx.x);
  Walk<T, false, kOneChannel> walk(plan, block, x);
  count_batch(num_batches_tracked);
  const auto next = [&] {
    const Vector<T, kVector> row = load<kVector>(walk.in(x, walk.at));
    walk.next(plan);
    return row;
  };
  StreamingMoments<acc_t<T>> moments[kOneChannel ? 1 : kVector] = {};
  add_rows<T, kVector>(walk.rows, next, moments);
  walk = Walk<T, false, kOneChannel>(plan, block, x);  // computed again, which saves registers in the loop
  merge_moments<kVector, kOneChannel>(plan, block, walk, moments, [&](const Moments& total, int64_t channel, int) {
    store_sums(partial_slot(plan, block, partials, channel), total);
  });
}

// A channel's moments in double throughout, for values whose squares exceed the range of float32. Few threads read the
// whole channel, so each loads several values before it uses one, and finds the next one by additions.
template <typename T>
__device__ Moments moments_in_double(const Group& group, const Shape& shape, const T* x, int64_t channel) {
  constexpr int kAtATime = 8;
  const int64_t count = shape.values_per_channel();
  const int64_t plane = shape.channels_last ? 1 : shape.s;                      // adjacent values of the channel
  const int64_t images = group.lanes / plane, positions = group.lanes % plane;  // from a thread's value to its next
  const auto sum_of = [&](const auto& term) {
    int64_t position = group.lane % plane;
    int64_t at = (group.lane / plane * shape.c + channel) * plane + position;
    double sum = 0;
    const auto add = [&](auto at_a_time) {
      Vector<T, 1> values[at_a_time.value];
#pragma unroll
      for (Vector<T, 1>& value : values) {
        value = load<1>(x + at);
        position += positions;
        at += images * shape.c * plane + positions;
        if (position >= plane) {
          position -= plane;
          at += (shape.c - 1) * plane;
        }
      }
#pragma unroll
      for (const Vector<T, 1>& value : values) sum += term(double(value[0]));
    };
    int64_t left = (count - group.lane + group.lanes - 1) / group.lanes;
    for (; left >= kAtATime; left -= kAtATime) add(Int<kAtATime>{});
    for (; left > 0; --left) add(Int<1>{});
    return group.sum(sum);
  };
  const double mean = sum_of([](double value) { return value; }) / double(count);
  return {mean, sum_of([mean](double value) { return (value - mean) * (value - mean); })};
}

// Computes moments again in double if their squares overflowed float32. All threads of a warp must call this together.
template <typename T>
__device__ Moments
mend_overflow(const Group& group, const ForwardParams& p, int64_t channel, bool exists, const Moments& moments) {
  const bool overflowed = exists && isfinite(moments.mean) && !isfinite(moments.m2);
  if (!__any_sync(kAllLanes, overflowed)) return moments;
  const Moments exact = moments_in_double<T>(group, p.shape, static_cast<const T*>(p.x), exists ? channel : 0);
  return overflowed ? exact : moments;
}

// Stores the saved statistics, for later kernels and the backward pass.
template <typename A>
__device__ void save(const ForwardParams& p, int64_t channel, A rstd, const Affine<A>& affine) {
  store_one(static_cast<A*>(p.mean) + channel, affine.mean);
  store_one(static_cast<A*>(p.rstd) + channel, rstd);
  store_one(static_cast<A*>(p.scale) + channel, affine.scale);
  store_one(static_cast<A*>(p.offset) + channel, affine.offset);
}

// The weight and the bias of a channel.
struct WeightAndBias {
  double weight;
  double bias;
};
inline __device__ WeightAndBias load_weight_and_bias(const ForwardParams& p, int64_t channel) {
  WeightAndBias own = {1, 0};
  read_params(p.weight, p.bias, p.params_dtype, channel, own.weight, own.bias);
  return own;
}

template <typename A>
__device__ A rstd_of(const ForwardParams& p, const Moments& total) {
  return static_cast<A>(1 / sqrt(total.m2 / double(p.shape.values_per_channel()) + p.eps));
}

// The coefficients of a channel, from the moments of the batch.
template <typename A>
__device__ Affine<A> affine_of_batch(const ForwardParams& p, const WeightAndBias& own, const Moments& total) {
  const A mean = static_cast<A>(total.mean);
  const A scale = rstd_of<A>(p, total) * static_cast<A>(own.weight);
  // Corrects for the rounding of the mean.
  const A offset = static_cast<A>(own.bias - (total.mean - double(mean)) * double(scale));
  return {mean, scale, offset};
}

// Stores the saved statistics and updates the running statistics of a channel.
template <typename A>
__device__ void store_statistics(const ForwardParams& p,
                                 int64_t channel,
                                 const Moments& total,
                                 const Affine<A>& affine) {
  save(p, channel, rstd_of<A>(p, total), affine);
  if (p.running_mean == nullptr) return;
  const double count = double(p.shape.values_per_channel());
  const double momentum =
      p.cumulative && p.num_batches_tracked != nullptr ? 1.0 / double(load_one(p.num_batches_tracked)) : p.momentum;
  double mean = 0, var = 0;
  read_params(p.running_mean, p.running_var, p.params_dtype, channel, mean, var);
  mean = momentum * total.mean + (1 - momentum) * mean;
  var = momentum * (total.m2 / (count - 1)) + (1 - momentum) * var;
  if (p.skip_nonfinite && !(can_hold(p.params_dtype, mean) && can_hold(p.params_dtype, var))) return;
  write_param(p.running_mean, p.params_dtype, channel, mean);
  write_param(p.running_var, p.params_dtype, channel, var);
}

// Merges the partial moments of each channel, and stores its saved and running statistics.
// Grid: a group of `lanes` threads per channel; its first thread stores.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    finalise_statistics_kernel(const Plan plan, int lanes, const ForwardParams p, const Moments* partials) {
  pdl_wait();
  const ChannelSums<Moments> sums(plan, lanes, partials);
  WeightAndBias own = {};
  if (sums.is_first()) own = load_weight_and_bias(p, sums.channel);
  const double share = 1 / double(p.shape.values_per_channel());
  const auto count_of = [&](int64_t segment) { return plan.values_of(segment); };
  const Moments merged = merge<kFinalisedAtATime>(sums.group, sums.parts, sums, count_of, share);
  const Moments total = mend_overflow<T>(sums.group, p, sums.channel, sums.parts > 0, merged);
  if (!sums.is_first()) return;
  store_statistics(p, sums.channel, total, affine_of_batch<acc_t<T>>(p, own, total));
}

}  // namespace bn_ext::cuda
