// The forward pass on the multi-kernel path: statistics, finalise, apply. Eval mode and recomputation need only apply.
// single_pass_forward.cuh has the single-pass path.
#pragma once

#include "apply.cuh"
#include "dispatch.cuh"
#include "launches.h"
#include "statistics.cuh"

namespace bn_ext::cuda {
namespace {

template <typename A>
__device__ Affine<A> affine_of_running(const ForwardParams& p, int64_t channel, bool saves) {
  A mean = 0, var = 1, weight = 1, bias = 0;
  read_params(p.running_mean, p.running_var, p.params_dtype, channel, mean, var);
  read_params(p.weight, p.bias, p.params_dtype, channel, weight, bias);
  const A rstd = 1 / sqrt(var + static_cast<A>(p.eps));
  const Affine<A> affine = {mean, rstd * weight, bias};
  if (saves) save(p, channel, rstd, affine);
  return affine;
}

// y = activation((x - mean) * scale + offset + z), and the mask if it is wanted. The coefficients are the saved
// statistics; in eval mode, unless y is recomputed, the kernel computes and saves them first. Grid: one block per slice
// and segment. Blocks and rows run backwards, because the L2 cache still holds the data that statistics_kernel read
// last. Reads x and z once, writes y and the mask once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime) apply_kernel(const Plan plan, const ForwardParams p) {
  pdl_wait();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  const Block block = block_of(plan, gridDim.x - 1 - blockIdx.x);
  Walk<T, true, kOneChannel> walk(plan, block, p.x);
  Apply<T, kVector, kOneChannel, kVariant> apply(p);
  make_coefficients<kVector, kOneChannel>(plan, block, walk, apply.affine, [&](int64_t channel, bool is_first) {
    return p.training || p.recompute ? saved_affine<A>(p, channel) : affine_of_running<A>(p, channel, is_first);
  });
  using Row = typename decltype(apply)::Row;
  in_chunks<kChunkRows<V, bytes_of_apply(kVariant, sizeof(V))>>(walk.rows, [&](auto count, int) {
    Row rows[decltype(count)::value] = {};
#pragma unroll
    for (Row& row : rows) {
      row = apply.row(walk, load_last<kVector>(walk.in(p.x, walk.at)));
      walk.next(plan);
    }
#pragma unroll
    for (const Row& row : rows) apply.finish(plan, walk, row);
  });
}

template <typename T, int kVector, bool kOneChannel>
void launch_statistics(Pass& pass, const ForwardParams& p, const Plan& plan, Moments* partials) {
  pass.on_segments(statistics_kernel<T, kVector, kOneChannel>,
                   plan.block_partials() * sizeof(Moments),
                   static_cast<const T*>(p.x),
                   partials,
                   p.num_batches_tracked);
  pass.on_channels(finalise_statistics_kernel<T>, p, partials);
}

}  // namespace

template <typename T>
cudaError_t MultiKernelForward<T>::launch(const ForwardParams& p,
                                          const Plan& plan,
                                          const Workspace& workspace,
                                          cudaStream_t stream) {
  return Pass::run(plan, stream, [&](Pass& pass) {
    return dispatch_plan<T>(plan, [&](auto vector, auto one_channel) {
      constexpr int kVector = vector.value;
      constexpr bool kOneChannel = one_channel.value;
      if (p.training && !p.recompute) {
        launch_statistics<T, kVector, kOneChannel>(pass, p, plan, static_cast<Moments*>(workspace.memory));
      }
      return dispatch_variant<T, kVector>(variant_of(p, plan), [&](auto variant) {
        const size_t shared_bytes = plan.block_coefficients() * sizeof(Affine<acc_t<T>>);
        pass.on_segments(apply_kernel<T, kVector, kOneChannel, decltype(variant)::value>, shared_bytes, p);
        return pass.error();
      });
    });
  });
}

template <typename T>
cudaError_t MultiKernelForward<T>::ask_compiled_for(int& architecture) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finalise_statistics_kernel<T>);
  architecture = attributes.ptxVersion;
  return error;
}

}  // namespace bn_ext::cuda
