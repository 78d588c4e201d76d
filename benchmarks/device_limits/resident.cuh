// The schedule of the package's passes of one kernel, without their arithmetic: load a slice, exchange, store it.
#pragma once

#include "../../csrc/cuda/tile.cuh"
#include "teams.cuh"

namespace device_limits {

// y = x + the key of x's slice, which only the whole team together knows. Grid: the teams' blocks; each copies its rows
// of a slice into shared memory, 16 bytes at a time, all of them in flight at once; sums them as they arrive; exchanges
// sums with its team; and writes them from there, backwards. Reads x and writes y once.
__global__ void __launch_bounds__(512, 2)
    resident_copy_kernel(const Plan plan, const unsigned* x, unsigned* y, const bn_ext::cuda::Workspace workspace) {
  using namespace bn_ext::cuda;
  constexpr int kVector = kVectorBytes / sizeof(unsigned), kGroupRows = 4;
  const SinglePassMemory memory(plan, 1, sizeof(unsigned));
  const Tile<unsigned, kVector, 1> tile(plan, memory.tiles, {x});
  device_limits::Exchange exchange(plan, memory, workspace);
  for (Block block = exchange.first_block(); block.slice < plan.slices; block.slice += plan.teams) {
    Walk<unsigned, false, true> walk(plan, block, x);
    const Stages stages = tile.stages<kGroupRows>(walk.rows);  // one, because all rows fit
    tile.fetch_first<kGroupRows>(walk, stages);
    unsigned sum = 0;
    const unsigned char* address = tile.row_address(stages[0].begin);
    in_chunks<kGroupRows>(walk.rows, [&](auto count, int done) {
      if (done % kGroupRows == 0) tile.wait_for_group();
#pragma unroll
      for (int i = 0; i < decltype(count)::value; ++i, address += tile.row_bytes()) {
        sum += sum_of(tile.row(0, address).words);
      }
    });

    // Of warps, then of the block.
    sum = sum_of_warp(sum);
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    if (threadIdx.x % kWarpThreads == 0) shared_memory<unsigned>()[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      sum = 0;
      for (int i = 0; i < plan.threads / kWarpThreads; ++i) sum += shared_memory<unsigned>()[i];
      exchange.publish_sums(0, {double(sum), 1.0});
    }
    const unsigned key = exchange_keys(plan, exchange, block.slice)->words[0];

    Walk<unsigned, true, true> back(plan, block, y);
    in_chunks<kGroupRows>(back.rows, [&](auto count, int) {
#pragma unroll
      for (int row = 0; row < decltype(count)::value; ++row) {
        const uint4 value = tile.row(0, address -= tile.row_bytes()).words + uint4{key, key, key, key};
        store_last(back.in(y, back.at), Vector<unsigned, kVector>{value});
        back.next(plan);
      }
    });
  }
  exchange.finish();
}

}  // namespace device_limits
