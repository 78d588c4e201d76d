// The forward pass in three kernels: statistics, finalise, apply; in eval mode, apply alone.
#include "dispatch.cuh"
#include "kernels.h"
#include "merge.cuh"

namespace bn_ext::cuda {
namespace {

// Moments of a thread's values of one channel, batch by batch. The mean is kept in two parts: values are taken as
// deviations from the greater part, so that a large mean does not cancel, and what that part cannot hold is not lost.
template <typename A>
struct RunningMoments {
  A mean;
  A rest;  // of the mean
  A m2;

  // `before`: number of values so far; `share`: the batch's share in all values, the batch included.
  template <int kCount>
  __device__ void add(const A (&values)[kCount], A before, A share) {
    A batch_mean = 0;
    A batch_m2 = 0;
#pragma unroll
    for (const A value : values) batch_mean += value - mean;
    batch_mean /= kCount;
#pragma unroll
    for (const A value : values) {
      const A deviation = value - mean - batch_mean;
      batch_m2 += deviation * deviation;
    }
    const A delta = batch_mean - rest;
    m2 += batch_m2 + delta * delta * (before * share);
    rest += delta * share;
    const A new_mean = mean + rest;
    rest += mean - new_mean;
    mean = new_mean;
  }
};

// Each thread sums over its rows, each block over its threads: partials[channel * segments + segment].
// Grid: a block per slice and segment. Reads x once. Counts the batch, for finalise_statistics_kernel to see.
template <typename T, int kVector, bool kOneChannel>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    statistics_kernel(const Plan plan, const T* x, Moments* partials, int64_t* num_batches_tracked) {
  using A = acc_t<T>;
  const Block block(plan, blockIdx.x);
  Walk<false> walk(plan, block);
  if (num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    store_one(num_batches_tracked, load_one(num_batches_tracked) + 1);
  }

  RunningMoments<A> moments[kVector] = {};
  in_batches<kBatchRows<Vector<T, kVector>>>(walk.rows, [&](auto count, int done) {
    constexpr int kRows = decltype(count)::value;
    Vector<T, kVector> rows[kRows];
#pragma unroll
    for (Vector<T, kVector>& row : rows) {
      row = load<kVector>(x + walk.offset);
      walk.next(plan);
    }
    const A share = A(kRows) / A(done + kRows);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      A values[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) values[row] = rows[row][i];
      if (done == 0) moments[i].mean = values[0];
      moments[i].add(values, A(done), share);
    }
  });

  Moments sums[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sums[i] = {double(moments[i].mean) + double(moments[i].rest), double(moments[i].m2)};
  }
  leave_sums<kOneChannel>(plan, walk, sums);
  const int segment_rows = plan.rows_of(block.segment);
  const auto count_of = [&](int64_t i) {
    const int row_lane = static_cast<int>(i) / plan.partials_per_row;
    return double(rows_of_lane(plan, segment_rows, row_lane) * plan.partial_values);
  };
  merge_block(plan, block, partials, [&](const Group& group, int parts, const auto& get) {
    return merge(group, parts, get, count_of, plan.values_of(block.segment));
  });
}

// A channel's moments in double throughout: for values whose squares are beyond float32.
template <typename T>
__device__ Moments moments_in_double(const Group& group, const Shape& shape, const T* x, int64_t channel) {
  const double count = double(shape.values_per_channel());
  const auto sum_of = [&](const auto& term) {
    double sum = 0;
    for (int64_t i = group.lane; i < shape.values_per_channel(); i += group.lanes) {
      const int64_t offset =
          shape.channels_last ? i * shape.c + channel : (i / shape.s * shape.c + channel) * shape.s + i % shape.s;
      sum += term(double(load<1>(x + offset)[0]));
    }
    return group.sum(sum);
  };
  const double mean = sum_of([](double value) { return value; }) / count;
  return {mean, sum_of([mean](double value) { return (value - mean) * (value - mean); })};
}

// Channel by channel: mean and rstd, the running statistics, and the offset of apply_kernel.
// Grid: a group of `lanes` threads per channel.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime) finalise_statistics_kernel(
    const Plan plan, const ForwardParams p, const Moments* partials, int lanes, acc_t<T>* offsets) {
  using A = acc_t<T>;
  const Group group(lanes);
  const int64_t channel = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const bool exists = channel < plan.channels;
  const double count = double(p.shape.values_per_channel());
  const auto get = [&](int64_t segment) { return load_sums(partials + channel * plan.segments + segment); };
  const auto count_of = [&](int64_t segment) { return plan.values_of(segment); };
  Moments total = merge(group, exists ? plan.segments : 0, get, count_of, count);
  const bool overflowed = exists && isfinite(total.mean) && !isfinite(total.m2);
  if (__any_sync(kAllLanes, overflowed)) {
    const Moments exact = moments_in_double(group, p.shape, static_cast<const T*>(p.x), exists ? channel : 0);
    if (overflowed) total = exact;
  }
  if (!exists || group.lane != 0) return;

  const double momentum =
      p.cumulative && p.num_batches_tracked != nullptr ? 1.0 / double(load_one(p.num_batches_tracked)) : p.momentum;
  const auto update = [&](void* running, double value) {
    if (running == nullptr) return;
    const double old = read_param<double>(running, p.params_dtype, channel, 0);
    write_param(running, p.params_dtype, channel, momentum * value + (1 - momentum) * old);
  };
  update(p.running_mean, total.mean);
  update(p.running_var, total.m2 / (count - 1));
  const A mean = static_cast<A>(total.mean);
  const double rstd = 1 / sqrt(total.m2 / count + p.eps);
  store_one(static_cast<A*>(p.mean) + channel, mean);
  store_one(static_cast<A*>(p.rstd) + channel, static_cast<A>(rstd));
  // Makes up for the mean's rounding.
  const double scale = rstd * read_param<double>(p.weight, p.params_dtype, channel, 1);
  const double offset = read_param<double>(p.bias, p.params_dtype, channel, 0) - (total.mean - double(mean)) * scale;
  store_one(offsets + channel, static_cast<A>(offset));
}

// y = (x - mean) * scale + offset
template <typename A>
struct Affine {
  A mean;
  A scale;
  A offset;
};

template <typename A>
__device__ Affine<A> affine_of_batch(const ForwardParams& p, const A* offsets, int64_t channel) {
  const A rstd = load_one(static_cast<const A*>(p.rstd) + channel);
  return {load_one(static_cast<const A*>(p.mean) + channel),
          rstd * read_param<A>(p.weight, p.params_dtype, channel, 1),
          load_one(offsets + channel)};
}

template <typename A>
__device__ Affine<A> affine_of_running(const ForwardParams& p, int64_t channel, bool saves) {
  const A mean = read_param<A>(p.running_mean, p.params_dtype, channel, 0);
  const A rstd = 1 / sqrt(read_param<A>(p.running_var, p.params_dtype, channel, 1) + static_cast<A>(p.eps));
  if (saves) {
    store_one(static_cast<A*>(p.mean) + channel, mean);
    store_one(static_cast<A*>(p.rstd) + channel, rstd);
  }
  return {mean,
          rstd * read_param<A>(p.weight, p.params_dtype, channel, 1),
          read_param<A>(p.bias, p.params_dtype, channel, 0)};
}

// Normalises. In eval mode it also tells what with, in p.mean and p.rstd.
// Grid: as statistics_kernel; blocks and rows go backwards, for what that read last is still in the cache. Reads x
// once, writes y once.
template <typename T, int kVector, bool kOneChannel>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    apply_kernel(const Plan plan, const ForwardParams p, const acc_t<T>* offsets) {
  using A = acc_t<T>;
  const Block block(plan, gridDim.x - 1 - blockIdx.x);
  Walk<true> walk(plan, block);
  Affine<A> affine[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(plan, block, walk, affine, [&](int64_t channel, bool is_first) {
    return p.training ? affine_of_batch<A>(p, offsets, channel) : affine_of_running<A>(p, channel, is_first);
  });

  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  in_batches<kBatchRows<Vector<T, kVector>>>(walk.rows, [&](auto count, int) {
    constexpr int kRows = decltype(count)::value;
    Vector<T, kVector> rows[kRows];
    int64_t offsets_of_rows[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      offsets_of_rows[row] = walk.offset;
      rows[row] = load_last<kVector>(x + walk.offset);
      walk.next(plan);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Affine<A>& a = affine[kOneChannel ? 0 : i];
        rows[row].set(i, (rows[row][i] - a.mean) * a.scale + a.offset);
      }
      store_last(y + offsets_of_rows[row], rows[row]);
    }
  });
}

struct Workspace {
  Moments* partials;  // (C, segments)
  void* offsets;      // (C,) of the accumulate type

  Workspace(const Plan& plan, void* memory)
      : partials(static_cast<Moments*>(memory)), offsets(partials + plan.channels * plan.segments) {}
};

template <typename T, int kVector, bool kOneChannel>
cudaError_t launch_kernels(const ForwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  A* offsets = static_cast<A*>(workspace.offsets);
  if (p.training) {
    cudaError_t error = launch(statistics_kernel<T, kVector, kOneChannel>,
                               plan.blocks(),
                               plan.threads,
                               plan.block_partials() * sizeof(Moments),
                               stream,
                               plan,
                               static_cast<const T*>(p.x),
                               workspace.partials,
                               p.num_batches_tracked);
    if (error != cudaSuccess) return error;
    const int lanes = merge_lanes(plan.segments);
    error = launch(finalise_statistics_kernel<T>,
                   blocks_of_groups(plan.channels, lanes),
                   kMaxThreads,
                   0,
                   stream,
                   plan,
                   p,
                   workspace.partials,
                   lanes,
                   offsets);
    if (error != cudaSuccess) return error;
  }
  const size_t shared_bytes = plan.block_coefficients() * sizeof(Affine<A>);
  return launch(
      apply_kernel<T, kVector, kOneChannel>, plan.blocks(), plan.threads, shared_bytes, stream, plan, p, offsets);
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& p, const Plan& plan) {
  if (!p.training) return 0;
  return plan.channels * (plan.segments * sizeof(Moments) + sizeof(double));
}

cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream) {
  return dispatch(p.dtype, plan, [&](auto value, auto vector, auto one_channel) {
    return launch_kernels<decltype(value), vector.value, one_channel.value>(
        p, plan, Workspace(plan, workspace), stream);
  });
}

}  // namespace bn_ext::cuda
