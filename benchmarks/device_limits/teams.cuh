// Teams of blocks that exchange sums by the package's own code, without the arithmetic around it.
#pragma once

#include "../../csrc/cuda/exchange.cuh"
#include "stream.cuh"

namespace device_limits {

using bn_ext::cuda::GradSums;
using bn_ext::cuda::Plan;
using bn_ext::cuda::Team;

// As large as the coefficients of a channel in the package's forward pass.
struct Key {
  unsigned words[3];
};
using Exchange = bn_ext::cuda::Exchange<GradSums, Key>;

// What a team makes of its blocks' sums, doubles that hold whole numbers: wrong if a block is left out.
__host__ __device__ inline unsigned key_of(double words, double blocks) {
  return static_cast<unsigned>(static_cast<uint64_t>(words)) + static_cast<unsigned>(blocks) * 0x9e3779b1u;
}

struct TeamShape {
  Team kind;
  int blocks;        // of a team
  int64_t teams;     // in the grid
  int64_t slices;    // as many as teams, or where a team is one block or part of a grid, more, in turns
  int threads;       // of a block
  int rows;          // of a thread, one or more: vectors of 16 bytes
  int channels = 1;  // of a slice
};

// A plan of contiguous slices, each of one stretch of memory, for teams of that shape.
inline Plan plan_of(const TeamShape& shape) {
  Plan plan = {};
  plan.team = shape.kind;
  plan.segments = shape.blocks;
  plan.teams = shape.teams;
  plan.slices = shape.slices;
  plan.slice_channels = shape.channels;
  plan.channels = shape.slices * shape.channels;
  plan.threads = plan.row_lanes = shape.threads;
  plan.columns = 1;
  plan.vector = plan.row_values = kVectorBytes / static_cast<int>(sizeof(unsigned));
  plan.rows_per_thread = plan.kept_rows = shape.rows;
  plan.rows_of_segment = int64_t(plan.row_lanes) * plan.rows_per_thread;
  plan.rows = plan.image_rows = plan.segments * plan.segment_rows();
  plan.slice_width = plan.rows * plan.vector;
  plan.pitch = plan.slice_width * plan.slices;
  plan.step_rows = static_cast<int>(plan.row_lanes % plan.image_rows);
  plan.step_offset = plan.row_lanes / plan.image_rows * plan.pitch + int64_t(plan.step_rows) * plan.vector;
  plan.wrap_offset = plan.pitch - plan.image_rows * plan.vector;
  plan.pieces = plan.merge_lanes = 1;
  plan.warp_rows = bn_ext::cuda::kWarpThreads;
  plan.team_lanes = 1;
  while (plan.team_lanes < std::min(shape.blocks, bn_ext::cuda::kWarpThreads)) plan.team_lanes *= 2;
  plan.one_channel = true;
  return plan;
}

// In memory whose first counter_bytes(plan) are zero.
inline bn_ext::cuda::Workspace workspace_at(void* memory, const Plan& plan) {
  return {static_cast<unsigned char*>(memory) + counter_bytes(plan), static_cast<bn_ext::cuda::TeamCounters*>(memory)};
}

// When all blocks of the team have left their sums of the slice's channels: the keys. All threads must call this.
inline __device__ const Key* exchange_keys(const Plan& plan, Exchange& exchange, int64_t slice) {
  const auto load = [](int64_t) { return 0; };  // channels have no numbers of their own here
  exchange.for_assigned_channels(slice, load, [&](const bn_ext::cuda::Channel& channel, int, const auto& get) {
    const GradSums total = merge(channel.group, channel.exists ? plan.segments : 0, get);
    if (!channel.is_first()) return;
    exchange.publish_coefficients(channel.slot, Key{{key_of(total.dy, total.dy_centred), 0, 0}});
  });
  return exchange.gather_coefficients(slice);
}

// What a block leaves of a channel in exchange_kernel.
__host__ __device__ inline unsigned left_sum(int round, int64_t segment, int place) {
  return static_cast<unsigned>((segment + 1) * (place + 1) + round);
}

// Rounds of: leave the sums of some channels, merge them, gather their keys. sums: (blocks, warps), of the keys that
// each thread looked at. Grid: the teams' blocks, one slice each. Moves nothing but what teams of a grid exchange.
__global__ void __launch_bounds__(512, 2)
    exchange_kernel(const Plan plan, int rounds, unsigned* sums, const bn_ext::cuda::Workspace workspace) {
  Exchange exchange(plan, bn_ext::cuda::SinglePassMemory(plan, 1, sizeof(unsigned)), workspace);
  const bn_ext::cuda::Block block = exchange.first_block();
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int place = static_cast<int>(threadIdx.x); place < plan.slice_channels; place += plan.threads) {
      exchange.publish_sums(place, {double(left_sum(round, block.segment, place)), 1.0});
    }
    const Key* keys = exchange_keys(plan, exchange, block.slice);
    for (int place = static_cast<int>(threadIdx.x); place < plan.slice_channels; place += plan.threads) {
      sum += keys[place].words[0];
    }
    round + 1 < rounds ? exchange.wait_for_readers() : exchange.finish();
  }
  leave_sum(sums, sum);
}

}  // namespace device_limits
