// The backward pass on the multi-kernel path: gradient sums, finalise, gradient of the input. A pass skips the kernels
// that it does not need. In eval mode the first kernel, if it runs, also writes dx. The first of the sums and input
// kernels that runs writes dz. single_pass_backward.cuh has the single-pass path.
#pragma once

#include <algorithm>

#include "dispatch.cuh"
#include "gradient.cuh"
#include "launches.h"
#include "pass.cuh"

namespace bn_ext::cuda {
namespace {

// The bytes of each tensor that a thread has in flight: as many as registers allow.
constexpr int bytes_of_sums(Variant variant, int value_bytes, bool one_channel, bool writes) {
  if (variant == Variant::kAny) return value_bytes == 8 ? 8 : 16;
  if (variant > Variant::kRelu) return 16;
  return one_channel ? (writes ? 32 : 64) : (writes ? 16 : 32);
}
constexpr int bytes_of_input(Variant variant) { return variant <= Variant::kRelu ? 32 : 16; }

// sum(g) and sum(g * (x - mean)) of each segment: partials[channel * segments + segment]. Each thread sums its rows,
// each block its threads. kWrites: also writes dz = g, and in eval mode dx = g * scale, which needs no sums. Grid: one
// block per slice and segment. Reads dy once, the mask or z once, and x once if dweight, dx in training, or u needs it.
template <typename T, int kVector, bool kOneChannel, Variant kVariant, bool kWrites>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    grad_sums_kernel(const Plan plan, const BackwardParams p, GradSums* partials) {
  pdl_wait();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  using Gradients = Gradient<T, kVector, kVariant, false>;
  const Block block = block_of(plan, blockIdx.x);
  Walk<T, false, kOneChannel> walk(plan, block, p.dy);
  const bool writes_dx = kWrites && !p.training && p.dx != nullptr;
  const bool writes_dz = kWrites && p.dz != nullptr;
  Affine<A> affine[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(plan, block, walk, affine, [&](int64_t channel, bool) {
    return saved_affine<A>(p, channel, writes_dx || p.needs_u(), p.needs_u());
  });

  const Gradients g(p, p.dweight != nullptr || (p.training && p.dx != nullptr));
  A sum_dy[kVector] = {};
  A sum_dy_centred[kVector] = {};
  const auto finish = [&](const typename Gradients::Row& row) {
    A row_dx[kVector];
    A row_dz[kVector];
    with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Affine<A>& a = affine[kOneChannel ? 0 : i];
        const A value = g.at(formula, row, i, a);
        sum_dy[i] += value;
        sum_dy_centred[i] += value * (row.x[i] - a.mean);
        row_dx[i] = value * a.scale;
        row_dz[i] = value;
      }
    });
    if (writes_dx) store_result(walk.in(p.dx, row.at), V::rounded(row_dx), plan.result_policy);
    if (writes_dz) store(walk.in(p.dz, row.at), V::rounded(row_dz));  // grad_input_kernel may read it
  };
  g.template for_rows<bytes_of_sums(kVariant, sizeof(T), kOneChannel, kWrites)>(plan, walk, finish);

  GradSums sums[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = {double(sum_dy[i]), double(sum_dy_centred[i])};
  store_partials<kVector, kOneChannel>(plan, walk, sums);
  merge_gradients<kVector>(plan, block, [&](const GradSums& total, int64_t channel, int) {
    store_sums(partial_slot(plan, block, partials, channel), total);
  });
}

// Merges the sums of each channel, and stores dweight, dbias, and slope and shift of grad_input_kernel as (2, C).
// Grid: a group of `lanes` threads per channel; its first thread stores.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) finalise_gradients_kernel(
    const Plan plan, int lanes, const BackwardParams p, const GradSums* partials, acc_t<T>* coefficients) {
  pdl_wait();
  using A = acc_t<T>;
  const ChannelSums<GradSums> sums(plan, lanes, partials);
  SavedScale saved = {};
  if (sums.is_first()) saved = load_scale<A>(p, sums.channel);
  const GradSums total = merge<kFinalisedAtATime>(sums.group, sums.parts, sums);
  if (!sums.is_first()) return;

  store_gradients(p, sums.channel, saved.rstd, total);
  const Slope<A> slope = slope_of<A>(p, saved, total);
  store_one(coefficients + sums.channel, slope.slope);
  store_one(coefficients + p.shape.c + sums.channel, slope.shift);
}

template <typename A>
__device__ GradAffine<A> grad_affine(const BackwardParams& p, const A* coefficients, int64_t channel) {
  Affine<A> affine = saved_affine<A>(p, channel, p.dx != nullptr || p.needs_u(), p.needs_u());
  if (!p.training || p.dx == nullptr) {
    if (!p.needs_u()) affine.mean = 0;  // like x, which is not read
    return {affine, {-A(0), -A(0)}};
  }
  return {affine, {load_one(coefficients + channel), load_one(coefficients + p.shape.c + channel)}};
}

// dx = g * scale + (x - mean) * slope + shift, and dz = g.
// Grid: one block per slice and segment. Blocks and rows run backwards, because the L2 cache still holds the data that
// grad_sums_kernel read last. Reads dy once, the mask or z once, and x once in training or for u. In other cases it
// must not read x, because an inf in x must not reach dx. Writes each result once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtATime)
    grad_input_kernel(const Plan plan, const BackwardParams p, const acc_t<T>* coefficients) {
  pdl_wait();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  using Gradients = Gradient<T, kVector, kVariant, true>;
  const Block block = block_of(plan, gridDim.x - 1 - blockIdx.x);
  Walk<T, true, kOneChannel> walk(plan, block, p.dy);
  GradAffine<A> affine[kOneChannel ? 1 : kVector] = {};
  make_coefficients<kVector, kOneChannel>(
      plan, block, walk, affine, [&](int64_t channel, bool) { return grad_affine(p, coefficients, channel); });

  const Gradients g(p, p.training && p.dx != nullptr);
  const bool writes_dx = kVariant <= Variant::kRelu || p.dx != nullptr;
  const bool writes_dz = kVariant > Variant::kRelu && p.dz != nullptr;
  const auto run = [&](auto reads_x) {
    g.template for_rows<bytes_of_input(kVariant)>(plan, walk, [&](const typename Gradients::Row& row) {
      A row_dx[kVector];
      A row_dz[kVector];
      with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const GradAffine<A>& a = affine[kOneChannel ? 0 : i];
          const A value = g.at(formula, row, i, a.affine);
          row_dx[i] = a.dx(value, reads_x ? row.x[i] - a.affine.mean : A(0));
          row_dz[i] = value;
        }
      });
      if (writes_dx) store_result(walk.in(p.dx, row.at), V::rounded(row_dx), plan.result_policy);
      if (writes_dz) store_result(walk.in(p.dz, row.at), V::rounded(row_dz), plan.result_policy);
    });
  };
  if constexpr (kVariant == Variant::kRelu) {  // one loop per mode saves eight selections per row
    p.training ? run(std::true_type{}) : run(std::false_type{});
  } else {
    run(kVariant == Variant::kPlain || p.training);
  }
}

struct SumsAndCoefficients {
  GradSums* partials;  // (C, segments)
  void* coefficients;  // (2, C) of the accumulate type

  SumsAndCoefficients(const Plan& plan, void* memory)
      : partials(static_cast<GradSums*>(memory)), coefficients(partials + plan.channels * plan.segments) {}
};

template <typename T, int kVector, bool kOneChannel, Variant kVariant>
void launch_sums(Pass& pass, const BackwardParams& p, const Plan& plan, const SumsAndCoefficients& workspace) {
  using A = acc_t<T>;
  // kWrites is false only for variants in which that allows more rows in flight.
  const auto kernel = p.dz != nullptr || (p.dx != nullptr && !p.training)
                          ? grad_sums_kernel<T, kVector, kOneChannel, kVariant, true>
                          : grad_sums_kernel<T, kVector, kOneChannel, kVariant, (kVariant > Variant::kRelu)>;
  const size_t shared_bytes =
      std::max(plan.block_partials() * sizeof(GradSums), plan.block_coefficients() * sizeof(Affine<A>));
  pass.on_segments(kernel, shared_bytes, p, workspace.partials);
  pass.on_channels(finalise_gradients_kernel<T>, p, workspace.partials, static_cast<A*>(workspace.coefficients));
}

template <typename T, int kVector, bool kOneChannel>
cudaError_t launch_multi_kernel(Pass& pass, BackwardParams p, const Plan& plan, const SumsAndCoefficients& workspace) {
  if (p.needs_sums()) {
    const cudaError_t error = dispatch_variant<T, kVector>(variant_of(p, plan), [&](auto variant) {
      launch_sums<T, kVector, kOneChannel, decltype(variant)::value>(pass, p, plan, workspace);
      return pass.error();
    });
    if (error != cudaSuccess) return error;
    p = after_sums(p);
  }
  if (p.dx == nullptr && p.dz == nullptr) return cudaSuccess;
  return dispatch_variant<T, kVector>(variant_of(p, plan), [&](auto variant) {
    pass.on_segments(grad_input_kernel<T, kVector, kOneChannel, decltype(variant)::value>,
                     plan.block_coefficients() * sizeof(GradAffine<acc_t<T>>),
                     p,
                     static_cast<const acc_t<T>*>(workspace.coefficients));
    return pass.error();
  });
}

}  // namespace

template <typename T>
cudaError_t MultiKernelBackward<T>::launch(const BackwardParams& p,
                                           const Plan& plan,
                                           const Workspace& memory,
                                           cudaStream_t stream) {
  const SumsAndCoefficients workspace(plan, memory.memory);
  return Pass::run(plan, stream, [&](Pass& pass) {
    return dispatch_plan<T>(plan, [&](auto vector, auto one_channel) {
      return launch_multi_kernel<T, vector.value, one_channel.value>(pass, p, plan, workspace);
    });
  });
}

}  // namespace bn_ext::cuda
