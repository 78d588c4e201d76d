// The ways a pass can go through the kernels, and machines whose planner chooses them for small tensors.
#pragma once

#include "../../csrc/cuda/plan.h"

namespace kernels_driver {

using bn_ext::cuda::Machine;
using bn_ext::cuda::Plan;
using bn_ext::cuda::Team;

enum class Path {
  kMultiKernel,      // three kernels
  kBlock,            // teams of one block
  kCluster,          // of a cluster
  kClusterSpilling,  // that cannot keep all of a slice
  kGrid,             // of a cooperative grid, several at a time, and one after the other
  kGridSpilling,
  kWholeGrid,  // one over all multiprocessors
  kAny,        // what the device's own planner chooses
};

const char* name_of(Path path);

// Whether a device has it.
bool has(const Machine& device, Path path);

// The machine to plan for: like the device, but with no more shared memory than leads to this path. `request` is that
// of the backward pass, which keeps more.
Machine machine_for(Path path, bn_ext::cuda::Request request, const Machine& device);

// Whether a plan of a pass whose slices can stay on chip goes this way.
bool takes(Path path, const Plan& plan);

// About how many rows of a slice that many threads stand behind each other for, so that it does: of wide planes,
// or of narrow ones, whose slices may be cut in two before something spills.
int rows_per_thread(Path path, bool wide_planes, const Machine& device);

}  // namespace kernels_driver
