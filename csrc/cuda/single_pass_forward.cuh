// The forward pass in training on the single-pass path: teams hold slices of x on chip, so x is read once, apart from
// spilled rows.
#pragma once

#include "ahead.cuh"
#include "apply.cuh"
#include "dispatch.cuh"
#include "exchange.cuh"
#include "launches.h"
#include "statistics.cuh"
#include "tile.cuh"

namespace bn_ext::cuda {
namespace {

constexpr int kTensors = 1;  // in tiles

// Statistics of each slice; then y = activation((x - mean) * scale + offset + z), with rows in reverse order.
// Grid: one block per segment of a team. A block processes its segment of slice after slice, and all blocks of a team
// merge their sums; one block per channel stores its statistics. Requires single_pass_tiles(p) > 0 and, for clusters
// and grids, that the teams fit. Increments the count, which no thread of this kernel reads. Reads x and z once, and
// spilled rows of x twice; writes y and the mask once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kResidentAtATime)
    single_pass_forward_kernel(const Plan plan, const ForwardParams p, const Workspace workspace) {
  pdl_wait();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  const SinglePassMemory memory(plan, kTensors, sizeof(T));
  const Tile<T, kVector, kTensors> tile(plan, memory.tiles, {p.x});
  Exchange<Moments, Affine<A>> exchange(plan, memory, workspace);
  count_batch(p.num_batches_tracked);
  stagger(plan, exchange.first_block().slice);
  for (Block block = exchange.first_block(); block.slice < plan.slices; block.slice += plan.teams) {
    exchange.clock.mark(Phase::kStart);
    // Fetch.
    Walk<T, false, kOneChannel> walk(plan, block, p.x);
    constexpr int kStates = kOneChannel ? 1 : kVector;
    constexpr int kGroupRows = kAddedRows<T, kVector, kStates>;
    const Stages stages = tile.template stages<kGroupRows>(walk.rows);
    tile.template fetch_first<kGroupRows>(walk, stages);
    exchange.clock.mark(Phase::kFetchIssued);

    // Statistics.
    StreamingMoments<A> moments[kStates] = {};
    for (int stage = 0, done = 0; stage < stages.count; ++stage) {
      const int begin = stages[stage].begin;
      int i = 0;
      const auto next = [&] {
        if (i % kGroupRows == 0) tile.wait_for_group();
        exchange.clock.mark(Phase::kFetched);
        return tile.row(0, tile.row_address(begin + i++));
      };
      add_rows<T, kVector>(done + stages[stage].rows, next, moments, done);
      done += stages[stage].rows;
      tile.template fetch_in_groups<kGroupRows>(walk, stages, stage + 2);
    }

    // Publish.
    merge_moments<kVector, kOneChannel>(plan, block, walk, moments, [&](const Moments& total, int64_t, int slot) {
      exchange.publish_sums(slot, total);
    });
    exchange.clock.mark(Phase::kSummed);
    prefetch_next_slice<T, kOneChannel>(plan, block, p.x);
    Walk<T, true, kOneChannel> back(plan, block, p.y);  // computed here, before a wait for other blocks
    if constexpr (kVariant > Variant::kRelu) {
      if (p.z != nullptr) prefetch_rows(plan, back, p.z, min(back.rows, plan.kept_rows));
    }

    // Coefficients.
    const double share = 1 / double(p.shape.values_per_channel());
    const auto load = [&](int64_t channel) { return load_weight_and_bias(p, channel); };
    exchange.for_assigned_channels(block.slice, load, [&](const Channel& channel, const auto& own, const auto& get) {
      const auto count_of = [&](int64_t segment) { return plan.values_of(segment); };
      const Moments merged =
          merge<sizeof(T) == 8 ? 2 : 4>(channel.group, channel.exists ? plan.segments : 0, get, count_of, share);
      const Moments total = mend_overflow<T>(channel.group, p, channel.index, channel.exists, merged);
      __syncwarp();  // for keep_total
      if (!channel.is_first()) return;
      exchange.keep_total(channel.slot, total);
      exchange.publish_coefficients(channel.slot, affine_of_batch<A>(p, own, total));
    });
    exchange.clock.mark(Phase::kCoefficients);
    const Affine<A>* of_slice = exchange.gather_coefficients(block.slice);
    exchange.clock.mark(Phase::kGathered);
    exchange.for_assigned_totals(block.slice, [&](int64_t channel, const Moments& total, const Affine<A>& affine) {
      store_statistics(p, channel, total, affine);
    });

    // Apply.
    Apply<T, kVector, kOneChannel, kVariant> apply(p);
    pick_coefficients<kVector, kOneChannel>(plan, back, of_slice, apply.affine);
    for (int stage = stages.count - 1; stage >= 0; --stage) {
      int i = stages[stage].begin + stages[stage].rows;
      tile.wait_for_stage();
      in_chunks<kChunkRows<V, bytes_of_apply(kVariant, sizeof(V), true)>>(stages[stage].rows, [&](auto count, int) {
        typename decltype(apply)::Row rows[decltype(count)::value] = {};
#pragma unroll
        for (auto& row : rows) {
          row = apply.row(back, tile.row(0, tile.row_address(--i)));
          back.next(plan);
        }
#pragma unroll
        for (const auto& row : rows) apply.finish(plan, back, row);
      });
      tile.fetch_again(back, stages, stage);
    }
    exchange.clock.mark(Phase::kWritten);
  }
  exchange.finish();
}

// Calls body(kernel, grid) with the kernel and the grid of the plan.
template <typename T, typename Body>
cudaError_t with_kernel(const ForwardParams& p, const Plan& plan, const Body& body) {
  const Variant variant = variant_of(p, plan);
  return dispatch_plan<T>(plan, variant, [&](auto vector, auto one_channel, auto chosen) {
    return body(single_pass_forward_kernel<T, vector.value, one_channel.value, chosen.value>,
                grid_of_teams(plan, kTensors, sizeof(T)));
  });
}

}  // namespace

template <typename T>
cudaError_t SinglePassForward<T>::launch(const ForwardParams& p,
                                         const Plan& plan,
                                         const Workspace& workspace,
                                         cudaStream_t stream) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::launch(kernel, grid, stream, plan, p, workspace); });
}

template <typename T>
cudaError_t SinglePassForward<T>::ask_whether_fits(const ForwardParams& p, const Plan& plan, bool& fits) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::ask_whether_fits(kernel, grid, fits); });
}

}  // namespace bn_ext::cuda
