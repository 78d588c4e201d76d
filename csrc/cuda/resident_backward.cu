// The backward pass in training, where a block can hold a slice of dy and of x: each is read once.
#include "dispatch.cuh"
#include "gradient.cuh"
#include "resident.h"
#include "tile.cuh"

namespace bn_ext::cuda {
namespace {

constexpr int kTensors = 2;  // in tiles

// Sums of g and g * (x - mean) of a slice from its tiles, then dx and dz, as they are wanted. A mask is read twice.
// Grid: a block per slice. Reads dy and x once, writes each result once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    resident_backward_kernel(const Plan plan, const BackwardParams p) {
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  using Gradients = Gradient<T, kVector, kVariant, true>;
  const ResidentMemory memory(plan, kTensors, sizeof(T));
  const Tile<T, kVector> dy(plan, memory.tiles, 0);
  const Tile<T, kVector> x(plan, memory.tiles, 1);
  const Block block(plan, blockIdx.x);
  Walk<false> walk(plan, block);
  for (int i = 0; i < walk.rows; ++i) {
    dy.fetch(i, static_cast<const T*>(p.dy) + walk.offset);
    x.fetch(i, static_cast<const T*>(p.x) + walk.offset);
    walk.next(plan);
  }
  walk = Walk<false>(plan, block);
  Affine<A> affine[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(
      plan, block, walk, affine, [&](int64_t channel, bool) { return saved_affine<A>(p, channel, true, p.needs_u()); });
  dy.wait();

  const Gradients g(p, true);
  const auto for_rows = [&](const auto& finish) {
    for (int i = 0; i < walk.rows; ++i) {
      finish(g.row(walk.offset, dy[i], x[i]));
      walk.next(plan);
    }
  };
  A sum_dy[kVector] = {};
  A sum_dy_centred[kVector] = {};
  for_rows([&](const typename Gradients::Row& row) {
    with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Affine<A>& a = affine[kOneChannel ? 0 : i];
        const A value = g.at(formula, row, i, a);
        sum_dy[i] += value;
        sum_dy_centred[i] += value * (row.x[i] - a.mean);
      }
    });
  });
  GradSums sums[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = {double(sum_dy[i]), double(sum_dy_centred[i])};
  walk = Walk<false>(plan, block);
  leave_sums<kOneChannel>(plan, walk, sums);
  Slope<A>* of_slice = shared_memory_at<Slope<A>>(memory.coefficients);
  merge_gradients(plan, block, [&](const GradSums& total, int64_t channel, int place) {
    of_slice[place] = finalise_gradient<A>(p, channel, total);
  });
  __syncthreads();

  if (p.dx == nullptr && p.dz == nullptr) return;
  Slope<A> slope[kOneChannel ? 1 : kVector] = {};
  pick_coefficients<kVector, kOneChannel>(plan, walk, of_slice, slope);
  for_rows([&](const typename Gradients::Row& row) {
    V row_dx;
    V row_dz;
    with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const GradAffine<A> a = {affine[kOneChannel ? 0 : i], slope[kOneChannel ? 0 : i]};
        const A value = g.at(formula, row, i, a.affine);
        row_dx.set(i, a.of_training(value, row.x[i]));
        row_dz.set(i, value);
      }
    });
    if (p.dx != nullptr) store_last(static_cast<T*>(p.dx) + row.offset, row_dx);
    if (kVariant != Variant::kPlain && p.dz != nullptr) store_last(static_cast<T*>(p.dz) + row.offset, row_dz);
  });
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  const Variant variant = variant_of(p.activation, p.z);
  return dispatch(p.dtype, plan, variant, [&](auto value, auto vector, auto one_channel, auto chosen) {
    using T = decltype(value);
    const auto kernel = resident_backward_kernel<T, vector.value, one_channel.value, chosen.value>;
    const size_t shared_bytes = ResidentMemory(plan, kTensors, sizeof(T)).bytes;
    return launch(kernel, plan.slices, plan.threads, shared_bytes, stream, plan, p);
  });
}

}  // namespace bn_ext::cuda
