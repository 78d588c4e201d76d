// The backward pass in training, where a team of blocks can hold a slice of dy and of x, or a part of it: each is read
// once, and what does not fit twice.
#pragma once

#include "dispatch.cuh"
#include "exchange.cuh"
#include "gradient.cuh"
#include "launches.h"
#include "tile.cuh"

namespace bn_ext::cuda {
namespace {

constexpr int kTensors = 2;    // in tiles
constexpr int kGroupRows = 4;  // of copies into them

// Rows of a thread at a time, whose bits of a mask are asked for together: as many as registers allow.
constexpr int rows_to_sum(Variant variant) {
  return variant == Variant::kAny ? 1 : variant == Variant::kReluLike ? 2 : kGroupRows;
}
constexpr int rows_to_write(Variant variant) {
  return variant == Variant::kAny ? 1 : variant == Variant::kReluLike ? 4 : 2;
}

// Sums of g and g * (x - mean) of a slice from its tiles, then, backwards, dx and dz, as they are wanted.
// Grid: the teams' blocks. Reads dy and x once, what is not in tiles twice, a mask twice; writes each result once.
template <typename T, int kVector, bool kOneChannel, Variant kVariant>
__global__ void __launch_bounds__(kMaxThreads, kResidentAtATime)
    resident_backward_kernel(const Plan plan, const BackwardParams p, const Workspace workspace) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  using V = Vector<T, kVector>;
  const ResidentMemory memory(plan, kTensors, sizeof(T));
  const Tile<T, kVector, kTensors> tile(plan, memory.tiles, {p.dy, p.x});
  const Gradient<T, kVector, kVariant, true> g(p, true);
  Exchange<GradSums, Slope<A>> exchange(plan, memory, workspace);
  for (Block block = exchange.first_block(); block.slice < plan.slices; block.slice += plan.teams) {
    exchange.clock.mark(Phase::kStart);
    Walk<T, false, kOneChannel> walk(plan, block, p.dy);
    Walk<T, false, kOneChannel> ahead = walk;
    int count = tile.first_chunk(walk.rows);
    tile.template fetch_in_groups<kGroupRows>(ahead, count, count == walk.rows);
    exchange.clock.mark(Phase::kFetchIssued);
    Affine<A> affine[kOneChannel ? 1 : kVector] = {};
    make_coefficients<kVector, kOneChannel>(plan, block, walk, affine, [&](int64_t channel, bool) {
      return saved_affine<A>(p, channel, true, p.needs_u());
    });
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
    for (int left = walk.rows; left > 0;) {
      in_batches<rows_to_sum(kVariant)>(count, [&](auto rows, int done) {
        constexpr int kRows = decltype(rows)::value;
        typename decltype(g)::Row batch[kRows] = {};
#pragma unroll
        for (auto& row : batch) {
          row.at = walk.at;
          row.passed = g.passed(walk);
          walk.next(plan);
        }
        if (done % kGroupRows == 0) tile.wait_for_group();
        exchange.clock.mark(Phase::kFetched);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          batch[i].dy = tile.row(0, done + i);
          batch[i].x = tile.row(1, done + i);
          add(batch[i]);
        }
      });
      left -= count;
      count = tile.last_chunk(left);
      tile.template fetch_in_groups<kGroupRows>(ahead, count, count == left);
    }
    GradSums sums[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = {double(sum_dy[i]), double(sum_dy_centred[i])};
    leave_sums<kVector, kOneChannel>(plan, walk, sums);
    merge_gradients<kVector>(
        plan, block, [&](const GradSums& total, int64_t, int place) { exchange.leave_sums(place, total); });
    exchange.clock.mark(Phase::kSummed);
    Walk<T, true, kOneChannel> back(plan, block, p.dx != nullptr ? p.dx : p.dz);  // as in forward
    const auto load = [&](int64_t channel) { return load_scale<A>(p, channel); };
    exchange.for_own_channels(block.slice, load, [&](const Channel& channel, const auto& saved, const auto& get) {
      const GradSums total = merge(channel.group, channel.exists ? plan.segments : 0, get);
      __syncwarp();  // for keep_total
      if (!channel.is_first()) return;
      exchange.keep_total(channel.place, total);
      exchange.leave_coefficients(channel.place, slope_of<A>(p, saved, total));
    });
    exchange.clock.mark(Phase::kCoefficients);
    const Slope<A>* of_slice = exchange.gather_coefficients(block.slice);
    exchange.clock.mark(Phase::kGathered);
    exchange.for_own_totals(block.slice, [&](int64_t channel, const GradSums& total, const Slope<A>&) {
      store_gradients(p, channel, load_one(static_cast<const A*>(p.rstd) + channel), total);
    });

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
      if (kVariant <= Variant::kRelu || p.dx != nullptr) store_last(back.in(p.dx, row.at), V::rounded(row_dx));
      if (kVariant > Variant::kRelu && p.dz != nullptr) store_last(back.in(p.dz, row.at), V::rounded(row_dz));
    };
    if (p.dx == nullptr && p.dz == nullptr) continue;
    for (int left = back.rows; left > 0;) {
      int i = tile.last_chunk(left);
      if (left < back.rows) {
        Walk<T, true, kOneChannel> again = back;
        tile.fetch(again, i, true);
        tile.wait();
      }
      left -= i;
      in_batches<rows_to_write(kVariant)>(i, [&](auto count, int) {
        typename decltype(g)::Row batch[decltype(count)::value] = {};
#pragma unroll
        for (auto& row : batch) {
          row.at = back.at;
          row.passed = g.passed(back);
          back.next(plan);
        }
#pragma unroll
        for (auto& row : batch) {
          --i;
          row.dy = tile.row(0, i);
          row.x = tile.row(1, i);
          finish(row);
        }
      });
    }
    exchange.clock.mark(Phase::kWritten);
  }
  exchange.finish();
}

// Calls body(kernel, grid) with the plan's.
template <typename T, typename Body>
cudaError_t with_kernel(const BackwardParams& p, const Plan& plan, const Body& body) {
  const Variant variant = variant_of(p, plan);
  return dispatch_plan<T>(plan, variant, [&](auto vector, auto one_channel, auto chosen) {
    return body(resident_backward_kernel<T, vector.value, one_channel.value, chosen.value>,
                grid_of_teams(plan, kTensors, sizeof(T)));
  });
}

}  // namespace

template <typename T>
cudaError_t ResidentBackward<T>::launch(const BackwardParams& p,
                                        const Plan& plan,
                                        const Workspace& workspace,
                                        cudaStream_t stream) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::launch(kernel, grid, stream, plan, p, workspace); });
}

template <typename T>
cudaError_t ResidentBackward<T>::ask_whether_fits(const BackwardParams& p, const Plan& plan, bool& fits) {
  return with_kernel<T>(
      p, plan, [&](auto* kernel, const Grid& grid) { return cuda::ask_whether_fits(kernel, grid, fits); });
}

}  // namespace bn_ext::cuda
