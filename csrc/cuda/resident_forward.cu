// The forward pass in training, where a block can hold a slice: x is read once.
#include "apply.cuh"
#include "dispatch.cuh"
#include "resident.h"
#include "statistics.cuh"
#include "tile.cuh"

namespace bn_ext::cuda {
namespace {

constexpr int kTensors = 1;  // in tiles

// Statistics of a slice from its tile, then y. Counts the batch, which no thread of this kernel looks at.
// Grid: a block per slice. Reads x and z once, writes y once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    resident_forward_kernel(const Plan plan, const ForwardParams p) {
  using A = acc_t<T>;
  const ResidentMemory memory(plan, kTensors, sizeof(T));
  const Tile<T, kVector> tile(plan, memory.tiles, 0);
  const Block block(plan, blockIdx.x);
  Walk<false> walk(plan, block);
  for (int i = 0; i < walk.rows; ++i) {
    tile.fetch(i, static_cast<const T*>(p.x) + walk.offset);
    walk.next(plan);
  }
  count_batch(p.num_batches_tracked);
  walk = Walk<false>(plan, block);
  tile.wait();

  RunningMoments<A> moments[kVector] = {};
  int row = 0;
  add_rows<T>(walk.rows, [&] { return tile[row++]; }, moments);
  Affine<A>* of_slice = shared_memory_at<Affine<A>>(memory.coefficients);
  merge_moments<kOneChannel>(
      plan,
      block,
      walk,
      moments,
      [&](const Group& group, int64_t channel, int parts, const Moments& total) {
        return mend_overflow<T>(group, p, channel, parts > 0, total);
      },
      [&](const Moments& total, int64_t channel, int place) {
        of_slice[place] = finalise_channel<A>(p, channel, total);
      });
  __syncthreads();

  Apply<T, kVector, kOneChannel, kVariant> apply(p);
  pick_coefficients<kVector, kOneChannel>(plan, walk, of_slice, apply.affine);
  using Row = typename decltype(apply)::Row;
  in_batches<kBatchRows<Vector<T, kVector>, 32>>(walk.rows, [&](auto count, int done) {
    Row rows[decltype(count)::value] = {};
#pragma unroll
    for (Row& r : rows) {
      r = {walk.offset, tile[done++], apply.z(walk.offset)};
      walk.next(plan);
    }
#pragma unroll
    for (const Row& r : rows) apply.finish(plan, r);
  });
}

}  // namespace

cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  const Variant variant = variant_of(p.activation, p.z);
  return dispatch(p.dtype, plan, variant, [&](auto value, auto vector, auto one_channel, auto chosen) {
    using T = decltype(value);
    const auto kernel = resident_forward_kernel<T, vector.value, one_channel.value, chosen.value>;
    const size_t shared_bytes = ResidentMemory(plan, kTensors, sizeof(T)).bytes;
    return launch(kernel, plan.slices, plan.threads, shared_bytes, stream, plan, p);
  });
}

}  // namespace bn_ext::cuda
