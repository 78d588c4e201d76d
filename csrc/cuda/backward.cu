// The backward pass in three kernels: gradient sums, finalise, gradient of the input; each only where it is needed. In
// eval mode the first one, where it runs, gives the gradient of the input too.
#include <algorithm>

#include "dispatch.cuh"
#include "kernels.h"
#include "merge.cuh"

namespace bn_ext::cuda {
namespace {

bool needs_sums(const BackwardParams& p) { return p.dweight || p.dbias || (p.dx && p.training); }

// A thread's vectors of dy, which may be one value for all.
template <typename T, int kVector>
class Gradient {
 public:
  explicit __device__ Gradient(const BackwardParams& p) : dy_(static_cast<const T*>(p.dy)), is_scalar_(p.dy_is_scalar) {
    if (!is_scalar_) return;
#pragma unroll
    for (T& value : all_.values) value = load<1>(dy_).values[0];
  }
  __device__ Vector<T, kVector> at(int64_t offset) const { return is_scalar_ ? all_ : load<kVector>(dy_ + offset); }
  __device__ Vector<T, kVector> last_at(int64_t offset) const {
    return is_scalar_ ? all_ : load_last<kVector>(dy_ + offset);
  }

 private:
  const T* dy_;
  bool is_scalar_;
  Vector<T, kVector> all_ = {};
};

template <typename A>
struct MeanAndScale {
  A mean;
  A scale;
};

template <typename A>
__device__ A scale_of(const BackwardParams& p, int64_t channel) {
  return load_one(static_cast<const A*>(p.rstd) + channel) * read_param<A>(p.weight, p.params_dtype, channel, 1);
}

// sum(dy) and sum(dy * (x - mean)): each thread over its rows, each block over its threads, into
// partials[channel * segments + segment]. kWritesDx, in eval mode: also dx = dy * scale, which needs no sums.
// Grid: a block per slice and segment. Reads dy once, and x once where dweight, or in training dx, is wanted.
template <typename T, int kVector, bool kOneChannel, bool kWritesDx>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    grad_sums_kernel(const Plan plan, const BackwardParams p, GradSums* partials) {
  using A = acc_t<T>;
  const Block block(plan, blockIdx.x);
  Walk<false> walk(plan, block);
  MeanAndScale<A> coefficients[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(plan, block, walk, coefficients, [&](int64_t channel, bool) {
    return MeanAndScale<A>{load_one(static_cast<const A*>(p.mean) + channel), kWritesDx ? scale_of<A>(p, channel) : 0};
  });

  const Gradient<T, kVector> dy(p);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const bool reads_x = p.dweight != nullptr || (p.training && p.dx != nullptr);
  A sum_dy[kVector] = {};
  A sum_dy_centred[kVector] = {};
  in_batches<kBatchRows<Vector<T, kVector>> / (kWritesDx ? 2 : 1)>(walk.rows, [&](auto count, int) {
    constexpr int kRows = decltype(count)::value;
    Vector<T, kVector> rows_dy[kRows];
    Vector<T, kVector> rows_x[kRows] = {};
    int64_t offsets[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      offsets[row] = walk.offset;
      rows_dy[row] = dy.at(walk.offset);
      if (reads_x) rows_x[row] = load<kVector>(x + walk.offset);
      walk.next(plan);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const MeanAndScale<A>& c = coefficients[kOneChannel ? 0 : i];
        const A g = rows_dy[row][i];
        sum_dy[i] += g;
        sum_dy_centred[i] += g * (rows_x[row][i] - c.mean);
        if (kWritesDx) rows_dy[row].set(i, g * c.scale);
      }
      if (kWritesDx) store_last(dx + offsets[row], rows_dy[row]);
    }
  });

  GradSums sums[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = {double(sum_dy[i]), double(sum_dy_centred[i])};
  leave_sums<kOneChannel>(plan, walk, sums);
  merge_block(
      plan, block, partials, [](const Group& group, int parts, const auto& get) { return merge(group, parts, get); });
}

// dx = dy * scale + (x - mean) * slope + offset
template <typename A>
struct GradAffine {
  A mean;
  A scale;
  A slope;
  A offset;
};

// Channel by channel: dweight, dbias, and the slope and offset of grad_input_kernel, in (2, C) coefficients.
// Grid: a group of `lanes` threads per channel.
template <typename A>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime) finalise_gradients_kernel(
    const Plan plan, const BackwardParams p, const GradSums* partials, int lanes, A* coefficients) {
  const Group group(lanes);
  const int64_t channel = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const bool exists = channel < plan.channels;
  const auto get = [&](int64_t segment) { return load_sums(partials + channel * plan.segments + segment); };
  const GradSums total = merge(group, exists ? plan.segments : 0, get);
  if (!exists || group.lane != 0) return;

  const double rstd = load_one(static_cast<const A*>(p.rstd) + channel);
  const double sum_dy_xhat = total.dy_centred * rstd;
  write_param(p.dweight, p.params_dtype, channel, sum_dy_xhat);
  write_param(p.dbias, p.params_dtype, channel, total.dy);
  const double scale = rstd * read_param<double>(p.weight, p.params_dtype, channel, 1);
  const double count = double(p.shape.values_per_channel());
  store_one(coefficients + channel, static_cast<A>(-scale * rstd * sum_dy_xhat / count));
  store_one(coefficients + p.shape.c + channel, static_cast<A>(-scale * total.dy / count));
}

template <typename A>
__device__ GradAffine<A> grad_affine(const BackwardParams& p, const A* coefficients, int64_t channel) {
  const A scale = scale_of<A>(p, channel);
  if (!p.training) return {0, scale, 0, 0};
  return {load_one(static_cast<const A*>(p.mean) + channel),
          scale,
          load_one(coefficients + channel),
          load_one(coefficients + p.shape.c + channel)};
}

// The gradient of the input.
// Grid: as grad_sums_kernel; blocks and rows go backwards, for what that read last is still in the cache. Reads dy
// once, and in training x once (in eval it is not looked at: an inf in it must not reach dx); writes dx once.
template <typename T, int kVector, bool kOneChannel>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    grad_input_kernel(const Plan plan, const BackwardParams p, const acc_t<T>* coefficients) {
  using A = acc_t<T>;
  const Block block(plan, gridDim.x - 1 - blockIdx.x);
  Walk<true> walk(plan, block);
  GradAffine<A> affine[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(
      plan, block, walk, affine, [&](int64_t channel, bool) { return grad_affine(p, coefficients, channel); });

  const Gradient<T, kVector> dy(p);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  in_batches<kBatchRows<Vector<T, kVector>> / 2>(walk.rows, [&](auto count, int) {
    constexpr int kRows = decltype(count)::value;
    Vector<T, kVector> rows_dy[kRows];
    Vector<T, kVector> rows_x[kRows] = {};
    int64_t offsets[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      offsets[row] = walk.offset;
      rows_dy[row] = dy.last_at(walk.offset);
      if (p.training) rows_x[row] = load_last<kVector>(x + walk.offset);
      walk.next(plan);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const GradAffine<A>& a = affine[kOneChannel ? 0 : i];
        rows_dy[row].set(i, rows_dy[row][i] * a.scale + ((rows_x[row][i] - a.mean) * a.slope + a.offset));
      }
      store_last(dx + offsets[row], rows_dy[row]);
    }
  });
}

struct Workspace {
  GradSums* partials;  // (C, segments)
  void* coefficients;  // (2, C) of the accumulate type

  Workspace(const Plan& plan, void* memory)
      : partials(static_cast<GradSums*>(memory)), coefficients(partials + plan.channels * plan.segments) {}
};

template <typename T, int kVector, bool kOneChannel>
cudaError_t launch_kernels(const BackwardParams& p, const Plan& plan, const Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  A* coefficients = static_cast<A*>(workspace.coefficients);
  const bool dx_with_sums = needs_sums(p) && !p.training && p.dx != nullptr;
  if (needs_sums(p)) {
    const auto kernel = dx_with_sums ? grad_sums_kernel<T, kVector, kOneChannel, true>
                                     : grad_sums_kernel<T, kVector, kOneChannel, false>;
    const size_t shared_bytes =
        std::max(plan.block_partials() * sizeof(GradSums), plan.block_coefficients() * sizeof(MeanAndScale<A>));
    cudaError_t error = launch(kernel, plan.blocks(), plan.threads, shared_bytes, stream, plan, p, workspace.partials);
    if (error != cudaSuccess) return error;
    const int lanes = merge_lanes(plan.segments);
    error = launch(finalise_gradients_kernel<A>,
                   blocks_of_groups(plan.channels, lanes),
                   kMaxThreads,
                   0,
                   stream,
                   plan,
                   p,
                   workspace.partials,
                   lanes,
                   coefficients);
    if (error != cudaSuccess) return error;
  }
  if (p.dx == nullptr || dx_with_sums) return cudaSuccess;
  return launch(grad_input_kernel<T, kVector, kOneChannel>,
                plan.blocks(),
                plan.threads,
                plan.block_coefficients() * sizeof(GradAffine<A>),
                stream,
                plan,
                p,
                coefficients);
}

}  // namespace

size_t backward_workspace_bytes(const BackwardParams& p, const Plan& plan) {
  if (!needs_sums(p)) return 0;
  return plan.channels * (plan.segments * sizeof(GradSums) + 2 * sizeof(double));
}

cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, void* workspace, cudaStream_t stream) {
  return dispatch(p.dtype, plan, [&](auto value, auto vector, auto one_channel) {
    return launch_kernels<decltype(value), vector.value, one_channel.value>(
        p, plan, Workspace(plan, workspace), stream);
  });
}

}  // namespace bn_ext::cuda
