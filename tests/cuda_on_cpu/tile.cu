// The tile of csrc/cuda alone: rows of x come to y by way of it, with as many waits as there should be, or with less.
#include <stdexcept>

#include "../../csrc/cuda/tile.cuh"
#include "c_api.h"

namespace bn_ext::cuda {
namespace {

constexpr int kGroupRows = 4;

// Does without the first `skipped` waits for a group.
__global__ void rows_kernel(const Plan plan, const float* x, float* y, int skipped) {
  const Tile<float, 4, 1> tile(plan, 0, {x});
  Walk<float, false, false> from(plan, {0, 0}, x), to(plan, {0, 0}, y);
  const int rows = from.rows;
  tile.fetch_in_groups<kGroupRows>(from, rows, true);
  for (int i = 0; i < rows; ++i) {
    if (i % kGroupRows == 0 && skipped-- <= 0) tile.wait_for_group();
    store_last(to.in(y, to.at), tile.row(0, i));
    to.next(plan);
  }
}

}  // namespace
}  // namespace bn_ext::cuda

// x, y: (rows, 4 * 32)
extern "C" const char* rows(const float* x, float* y, int64_t rows, int64_t skipped) {
  return cuda_on_cpu::reported([&] {
    bn_ext::cuda::Plan plan{};
    plan.slices = plan.segments = plan.teams = plan.image_rows = plan.row_lanes = 1;
    plan.columns = plan.threads = 32;
    plan.vector = 4;
    plan.pitch = plan.slice_width = plan.step_offset = 4 * 32;
    plan.rows = plan.rows_per_thread = plan.kept_rows = int(rows);
    cudaLaunchConfig_t config = {};
    config.gridDim = 1;
    config.blockDim = unsigned(plan.threads);
    config.dynamicSmemBytes = size_t(rows) * plan.threads * 16;
    const cudaError_t error = cudaLaunchKernelEx(&config, bn_ext::cuda::rows_kernel, plan, x, y, int(skipped));
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  });
}
