// Partial sums: what they are, and how groups of threads merge them, in a fixed order.
#pragma once

#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Number of values, their mean, and the sum of squared deviations from it.
struct Moments {
  double count;
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
  Sums sums;
  const double* from = reinterpret_cast<const double*>(p);
  double* to = reinterpret_cast<double*>(&sums);
#pragma unroll
  for (int i = 0; i < int(sizeof(Sums) / sizeof(double)); ++i) to[i] = load_one(from + i);
  return sums;
}

template <typename Sums>
__device__ void store_sums(Sums* p, const Sums& sums) {
  const double* from = reinterpret_cast<const double*>(&sums);
#pragma unroll
  for (int i = 0; i < int(sizeof(Sums) / sizeof(double)); ++i) store_one(reinterpret_cast<double*>(p) + i, from[i]);
}

// A group is `lanes` adjacent threads of a warp, a power of two; all threads of the warp must call these together.
// Every lane of the group gets the result.
inline __device__ double group_sum(double value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Merges get(0) ... get(count - 1): means about the common mean, and squares that make up for the distance from it
// (Chan, Golub and LeVeque 1979, for all parts at once).
template <typename Get>
__device__ Moments merge(int lane, int lanes, int64_t count, const Get& get, Moments) {
  double values = 0;
  double sum = 0;
  for (int64_t i = lane; i < count; i += lanes) {
    const Moments part = get(i);
    values += part.count;
    sum += part.count * part.mean;
  }
  values = group_sum(values, lanes);
  const double mean = group_sum(sum, lanes) / values;
  double m2 = 0;
  for (int64_t i = lane; i < count; i += lanes) {
    const Moments part = get(i);
    const double delta = part.mean - mean;
    m2 += part.m2 + part.count * (delta * delta);
  }
  return {values, mean, group_sum(m2, lanes)};
}

template <typename Get>
__device__ GradSums merge(int lane, int lanes, int64_t count, const Get& get, GradSums) {
  GradSums total = {0, 0};
  for (int64_t i = lane; i < count; i += lanes) {
    const GradSums part = get(i);
    total.dy += part.dy;
    total.dy_centred += part.dy_centred;
  }
  return {group_sum(total.dy, lanes), group_sum(total.dy_centred, lanes)};
}

// The sums of one thread's vectors, of equally many values each, in one.
template <int kCount>
__device__ Moments merge_own(const Moments (&parts)[kCount]) {
  Moments total = {0, 0, 0};
#pragma unroll
  for (const Moments& part : parts) total.mean += part.mean / kCount;
#pragma unroll
  for (const Moments& part : parts) {
    const double delta = part.mean - total.mean;
    total.count += part.count;
    total.m2 += part.m2 + part.count * (delta * delta);
  }
  return total;
}

template <int kCount>
__device__ GradSums merge_own(const GradSums (&parts)[kCount]) {
  GradSums total = {0, 0};
#pragma unroll
  for (const GradSums& part : parts) {
    total.dy += part.dy;
    total.dy_centred += part.dy_centred;
  }
  return total;
}

// Leaves a thread's sums, one for each value of its vectors, where merge_block looks for them.
template <bool kOneChannel, typename Sums, int kVector>
__device__ void leave_sums(const Plan& plan, const Walk& walk, const Sums (&sums)[kVector]) {
  if (walk.row_lane >= plan.row_lanes) return;
  const int thread = walk.row_lane * plan.columns + walk.column;
  if constexpr (kOneChannel) {
    shared_memory<Sums>()[thread] = merge_own(sums);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) shared_memory<Sums>()[thread * kVector + i] = sums[i];
  }
}

// After every thread has left its sums in shared memory (leave_sums): merges them by channel, into
// partials[channel * segments + segment].
template <typename Sums>
__device__ void merge_block(const Plan& plan, const Block& block, Sums* partials) {
  __syncthreads();
  const Sums* sums = shared_memory<Sums>();
  const int lanes = plan.merge_lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int per_row = plan.partials_per_row;
  const int row_stride = plan.block_partials() / plan.row_lanes;
  // All threads stay in the loop until its end: the warps merge together.
  for (int first = 0; first < plan.slice_channels; first += plan.threads / lanes) {
    const int in_slice = first + static_cast<int>(threadIdx.x) / lanes;
    const int64_t channel = block.slice * plan.slice_channels + in_slice;
    const bool exists = in_slice < plan.slice_channels && channel < plan.channels;
    const auto get = [&](int64_t i) {
      const int row_lane = static_cast<int>(i) / per_row;
      return sums[row_lane * row_stride + in_slice * per_row + static_cast<int>(i) % per_row];
    };
    const Sums total = merge(lane, lanes, exists ? plan.row_lanes * per_row : 0, get, Sums{});
    if (exists && lane == 0) store_sums(partials + channel * plan.segments + block.segment, total);
  }
}

}  // namespace bn_ext::cuda
