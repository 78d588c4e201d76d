// The backward pass in training on the single-pass path: teams hold slices of dy and x on chip, so both are read once,
// apart from spilled rows.
#pragma once

#include "ahead.cuh"
#include "dispatch.cuh"
#include "exchange.cuh"
#include "gradient.cuh"
#include "launches.h"
#include "tile.cuh"

namespace bn_ext::cuda {
namespace {

constexpr int kTensors = 2;    // in tiles
constexpr int kGroupRows = 4;  // rows per group of asynchronous copies

// Rows per thread in one chunk, as many as registers allow.
constexpr int rows_to_sum(Variant variant) { return variant == Variant::kAny ? 1 : kGroupRows; }
constexpr int rows_to_write(Variant variant) {
  return variant == Variant::kAny ? 1 : variant == Variant::kReluLike ? 2 : 4;
}

// sum(g) and sum(g * (x - mean)) of each slice; then dx = g * scale + (x - mean) * slope + shift and dz = g, if they
// are wanted, with rows in reverse order. Grid: one block per segment of a team. A block processes its segment of slice
// after slice, and all blocks of a team merge their sums; one block per channel stores dweight and dbias. Requires
// single_pass_tiles(p) > 0 and, for clusters and grids, that the teams fit. Reads dy, x and the mask once, and spilled
// rows twice; writes each result once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads, kResidentAtATime)
    single_pass_backward_kernel(const Plan plan, const BackwardParams p, const Workspace workspace) {
  pdl_wait();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  const SinglePassMemory memory(plan, kTensors, sizeof(T));
  const Tile<T, kVector, kTensors, kMasked> tile(plan, memory.tiles, {p.dy, p.x}, p.mask);
  const Gradient<T, kVector, kVariant, true> g(p, true, kMasked, false);
  Exchange<GradSums, Slope<A>> exchange(plan, memory, workspace);
  stagger(plan, exchange.first_block().slice);
  for (Block block = exchange.first_block(); block.slice < plan.slices; block.slice += plan.teams) {
    exchange.clock.mark(Phase::kStart);
    // Fetch.
    Walk<T, false, kOneChannel> walk(plan, block, p.dy);
    Walk<T, false, kOneChannel> ahead = walk;
    const Stages stages = tile.template stages<kGroupRows>(walk.rows);
    tile.template fetch_first<kGroupRows>(ahead, stages);
    exchange.clock.mark(Phase::kFetchIssued);
    Affine<A> affine[kOneChannel ? 1 : kVector] = {};
    make_coefficients<kVector, kOneChannel>(plan, block, walk, affine, [&](int64_t channel, bool) {
      return saved_affine<A>(p, channel, true, p.needs_u());
    });

    // Sums.
    A sum_dy[kVector] = {};
    A sum_dy_centred[kVector] = {};
    const auto add = [&](const auto& row) {
      with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const Affine<A>& a = affine[kOneChannel ? 0 : i];
          const A value = g.at(formula, row, i, a);
          sum_dy[i] += value;
          sum_dy_centred[i] += value * (row.x[i] - a.mean);
        }
      });
    };
    for (int stage = 0; stage < stages.count; ++stage) {
      const unsigned char* address = tile.row_address(stages[stage].begin);
      in_chunks<rows_to_sum(kVariant)>(stages[stage].rows, [&](auto rows, int done) {
        if (done % kGroupRows == 0) tile.wait_for_group();
        exchange.clock.mark(Phase::kFetched);
#pragma unroll
        for (int i = 0; i < decltype(rows)::value; ++i) {
          add(typename decltype(g)::Row{
              walk.at, tile.row(0, address), tile.row(1, address), {}, tile.passed(walk, address)});
          walk.next(plan);
          address += tile.row_bytes();
        }
      });
      tile.template fetch_in_groups<kGroupRows>(ahead, stages, stage + 2);
    }

    // Publish.
    GradSums sums[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = {double(sum_dy[i]), double(sum_dy_centred[i])};
    store_partials<kVector, kOneChannel>(plan, walk, sums);
    merge_gradients<kVector>(
        plan, block, [&](const GradSums& total, int64_t, int slot) { exchange.publish_sums(slot, total); });
    exchange.clock.mark(Phase::kSummed);
    prefetch_next_slice<T, kOneChannel>(plan, block, p.dy);
    prefetch_next_slice<T, kOneChannel>(plan, block, p.x);
    Walk<T, true, kOneChannel> back(plan, block, p.dx != nullptr ? p.dx : p.dz);  // as in single_pass_forward.cuh

    // Coefficients.
    const auto load = [&](int64_t channel) { return load_scale<A>(p, channel); };
    exchange.for_assigned_channels(block.slice, load, [&](const Channel& channel, const auto& saved, const auto& get) {
      const GradSums total = merge(channel.group, channel.exists ? plan.segments : 0, get);
      __syncwarp();  // for keep_total
      if (!channel.is_first()) return;
      exchange.keep_total(channel.slot, total);
      exchange.publish_coefficients(channel.slot, slope_of<A>(p, saved, total));
    });
    exchange.clock.mark(Phase::kCoefficients);
    const Slope<A>* of_slice = exchange.gather_coefficients(block.slice);
    exchange.clock.mark(Phase::kGathered);
    exchange.for_assigned_totals(block.slice, [&](int64_t channel, const GradSums& total, const Slope<A>&) {
      store_gradients(p, channel, load_one(static_cast<const A*>(p.rstd) + channel), total);
    });

    // Apply.
    Slope<A> slope[kOneChannel ? 1 : kVector] = {};
    pick_coefficients<kVector, kOneChannel>(plan, back, of_slice, slope);
    const auto finish = [&](const auto& row) {
      A row_dx[kVector];
      A row_dz[kVector];
      with_activation<kVariant, A>(p.activation, [&](const auto& formula) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const GradAffine<A> a = {affine[kOneChannel ? 0 : i], slope[kOneChannel ? 0 : i]};
          const A value = g.at(formula, row, i, a.affine);
          row_dx[i] = a.dx(value, row.x[i] - a.affine.mean);
          row_dz[i] = value;
        }
      });
      if (kVariant <= Variant::kRelu || p.dx != nullptr)
        store_result(back.in(p.dx, row.at), V::rounded(row_dx), plan.result_policy);
      if (kVariant > Variant::kRelu && p.dz != nullptr)
        store_result(back.in(p.dz, row.at), V::rounded(row_dz), plan.result_policy);
    };
    if (p.dx == nullptr && p.dz == nullptr) continue;
    for (int stage = stages.count - 1; stage >= 0; --stage) {
      const int count = stages[stage].rows;
      const unsigned char* address = tile.row_address(stages[stage].begin + count);
      tile.wait_for_stage();
      in_chunks<rows_to_write(kVariant)>(count, [&](auto rows, int) {
#pragma unroll
        for (int i = 0; i < decltype(rows)::value; ++i) {
          address -= tile.row_bytes();
          finish(typename decltype(g)::Row{
              back.at, tile.row(0, address), tile.row(1, address), {}, tile.passed(back, address)});
          back.next(plan);
        }
      });
      tile.fetch_again(back, stages, stage);
    }
    exchange.clock.mark(Phase::kWritten);
  }
  exchange.finish();
}

// Calls body(kernel, grid) with the kernel and the grid of the plan.
template <typename T, typename Body>
cudaError_t with_kernel(const BackwardParams& p, const Plan& plan, const Body& body) {
  const Variant variant = variant_of(p, plan);
  return dispatch_plan<T>(plan, variant, [&](auto vector, auto one_channel, auto chosen) {
    constexpr Variant kVariant = chosen.value;
    auto* kernel = single_pass_backward_kernel<T, vector.value, one_channel.value, kVariant, false>;
    if constexpr (kVariant == Variant::kReluLike) {
      if (p.mask != nullptr) kernel = single_pass_backward_kernel<T, vector.value, one_channel.value, kVariant, true>;
    }
    return body(kernel, grid_of_teams(plan, kTensors, sizeof(T)));
  });
}

}  // namespace

template <typename T>
cudaError_t SinglePassBackward<T>::launch(const BackwardParams& p,
                                          const Plan& plan,
                                          const Workspace& workspace,
                                          cudaStream_t stream) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::launch(kernel, grid, stream, plan, p, workspace); });
}

template <typename T>
cudaError_t SinglePassBackward<T>::ask_whether_fits(const BackwardParams& p, const Plan& plan, bool& fits) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::ask_whether_fits(kernel, grid, fits); });
}

}  // namespace bn_ext::cuda
