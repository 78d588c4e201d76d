// The tile of csrc/cuda alone: rows of x come to y by way of it, and then backwards to z, with as many waits as there
// should be, or with less.
#include <stdexcept>

#include "../../csrc/cuda/tile.cuh"
#include "c_api.h"

namespace bn_ext::cuda {
namespace {

constexpr int kGroupRows = 4;

// Does without the first wait for a group of that stage, or without its wait on the way back.
struct Skipped {
  int group_of;
  int stage;
};

__global__ void rows_kernel(const Plan plan, const float* x, float* y, float* z, const Skipped skipped) {
  const Tile<float, 4, 1> tile(plan, 0, {x});
  Walk<float, false, false> from(plan, {0, 0}, x), to(plan, {0, 0}, y);
  const Stages stages = tile.stages<kGroupRows>(from.rows);
  tile.fetch_first<kGroupRows>(from, stages);
  for (int stage = 0; stage < stages.count; ++stage) {
    for (int i = 0; i < stages[stage].rows; ++i) {
      if (i % kGroupRows == 0 && (i > 0 || stage != skipped.group_of)) tile.wait_for_group();
      store_last(to.in(y, to.at), tile.row(0, tile.row_address(stages[stage].begin + i)));
      to.next(plan);
    }
    tile.fetch_in_groups<kGroupRows>(from, stages, stage + 2);
  }
  Walk<float, true, false> back(plan, {0, 0}, z);
  for (int stage = stages.count - 1; stage >= 0; --stage) {
    if (stage != skipped.stage) tile.wait_for_stage();
    for (int i = stages[stage].rows - 1; i >= 0; --i) {
      store_last(back.in(z, back.at), tile.row(0, tile.row_address(stages[stage].begin + i)));
      back.next(plan);
    }
    tile.fetch_again(back, stages, stage);
  }
}

}  // namespace
}  // namespace bn_ext::cuda

// x, y, z: (rows, 4 * 32), of which so many are kept.
extern "C" const char* rows(
    const float* x, float* y, float* z, int64_t rows, int64_t kept, int64_t skipped_group_of, int64_t skipped_stage) {
  return cuda_on_cpu::reported([&] {
    bn_ext::cuda::Plan plan{};
    plan.slices = plan.segments = plan.teams = plan.image_rows = plan.row_lanes = 1;
    plan.columns = plan.threads = 32;
    plan.vector = 4;
    plan.pitch = plan.slice_width = plan.step_offset = 4 * 32;
    plan.rows = plan.rows_of_segment = plan.rows_per_thread = int(rows);
    plan.kept_rows = int(kept);
    cudaLaunchConfig_t config = {};
    config.gridDim = 1;
    config.blockDim = unsigned(plan.threads);
    config.dynamicSmemBytes = size_t(kept) * plan.threads * 16;
    const bn_ext::cuda::Skipped skipped = {int(skipped_group_of), int(skipped_stage)};
    const cudaError_t error = cudaLaunchKernelEx(&config, bn_ext::cuda::rows_kernel, plan, x, y, z, skipped);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  });
}
