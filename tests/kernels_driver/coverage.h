// Which kernels a pass takes and in which ways, told from its params and its plan, by the rules of csrc/cuda; and what
// there is to take. tests/cuda_on_cpu/test_kernels_driver.py compares with what was launched and what was compiled.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/plan.h"

namespace kernels_driver {

// A kernel as it is compiled, "apply_kernel<float, 4, true, plain>", and how it is taken, "apply_kernel: eval".
struct Launched {
  std::string kernel;
  std::vector<std::string> ways;
};

std::vector<Launched> launched_by(const bn_ext::ForwardParams& p, const bn_ext::cuda::Plan& plan);
std::vector<Launched> launched_by(const bn_ext::BackwardParams& p, const bn_ext::cuda::Plan& plan);

// All kernels that are compiled, and all ways that are possible where teams are.
std::set<std::string> all_kernels();
std::set<std::string> all_ways(const bn_ext::cuda::Machine& device);

}  // namespace kernels_driver
