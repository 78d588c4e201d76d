// Machines for paths: so many multiprocessors, and shared memory for so many rows of a thread.
#include "paths.h"

#include <algorithm>

namespace kernels_driver {
namespace {

using bn_ext::cuda::Request;
using bn_ext::cuda::SinglePassMemory;

constexpr int kTensors = 2;          // that a backward pass keeps
constexpr int kBlocksPerDevice = 2;  // on a multiprocessor, of those that keep slices
constexpr int kReservedBytes = 1024;

// Shared memory of a multiprocessor for which a thread keeps so many rows of a backward pass, and twice as many of a
// forward pass.
int shared_bytes_for(double rows, const Plan& multi_kernel, int value_bytes) {
  Plan none = multi_kernel;
  none.kept_rows = 0;
  const double row_bytes = double(multi_kernel.kept_row_bytes(kTensors, value_bytes));
  const double block_bytes = kReservedBytes + SinglePassMemory(none, kTensors, value_bytes).bytes + rows * row_bytes;
  return static_cast<int>(kBlocksPerDevice * block_bytes);
}

}  // namespace

const char* name_of(Path path) {
  switch (path) {
    case Path::kMultiKernel:
      return "multi-kernel";
    case Path::kBlock:
      return "block";
    case Path::kCluster:
      return "cluster";
    case Path::kClusterSpilling:
      return "cluster, spilling";
    case Path::kGrid:
      return "grid";
    case Path::kGridSpilling:
      return "grid, spilling";
    case Path::kWholeGrid:
      return "whole grid";
    case Path::kAny:
      return "any path";
  }
  return "";
}

bool has(const Machine& device, Path path) {
  switch (path) {
    case Path::kCluster:
    case Path::kClusterSpilling:
      return device.clusters;
    case Path::kGrid:
    case Path::kGridSpilling:
    case Path::kWholeGrid:
      return device.cooperative;
    default:
      return true;
  }
}

Machine machine_for(Path path, Request request, const Machine& device) {
  const bool clusters = path == Path::kCluster || path == Path::kClusterSpilling;
  const bool grids = path == Path::kGrid || path == Path::kGridSpilling || path == Path::kWholeGrid;
  const bool spills = path == Path::kClusterSpilling || path == Path::kGridSpilling;
  // Half the multiprocessors, so that a grid also finds room where a tool makes kernels larger.
  if (path == Path::kAny) {
    Machine half = device;
    half.multiprocessors = std::max(1, device.multiprocessors / 2);
    return half;
  }
  Machine machine = {4, 0, false, false, device.pdl};
  if (path == Path::kMultiKernel) return machine;
  if (path == Path::kWholeGrid) machine.multiprocessors = device.multiprocessors;
  if (spills) machine.multiprocessors = 1;
  request.single_pass_tiles = 0;
  const Plan multi_kernel = make_plan(request, machine);
  const double kept = path == Path::kBlock ? rows_per_thread(path, false, device) + 1 : spills ? 2.25 : 1.5;
  machine.shared_bytes = shared_bytes_for(kept, multi_kernel, request.value_bytes);
  machine.clusters = clusters;
  machine.cooperative = grids;
  machine.three_kernels = false;  // the path is to be taken, whatever takes less time
  machine.half_chip = bn_ext::cuda::HalfChip::kNever;
  return machine;
}

bool takes(Path path, const Plan& plan) {
  const bool spills = plan.spilled_rows() > 0;
  switch (path) {
    case Path::kMultiKernel:
      return plan.team == Team::kNone;
    case Path::kBlock:
      return plan.team == Team::kBlock && !spills;
    case Path::kCluster:
      return plan.team == Team::kCluster && !spills;
    case Path::kClusterSpilling:
      return plan.team == Team::kCluster && spills;
    case Path::kGrid:
      return plan.team == Team::kGrid && !spills;
    case Path::kGridSpilling:
      return plan.team == Team::kGrid && spills;
    case Path::kWholeGrid:
      return plan.team == Team::kGrid && !spills;
    case Path::kAny:
      return true;
  }
  return false;
}

int rows_per_thread(Path path, bool wide_planes, const Machine& device) {
  switch (path) {
    case Path::kBlock:
      return 2;
    case Path::kWholeGrid:
      return device.multiprocessors;
    case Path::kMultiKernel:
      return 8;
    case Path::kClusterSpilling:
    case Path::kGridSpilling:
      return wide_planes ? 12 : 24;
    default:
      return 4;
  }
}

}  // namespace kernels_driver
