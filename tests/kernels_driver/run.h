// Runs a case on the device and compares all that it wrote with the reference.
#pragma once

#include <string>
#include <vector>

#include "cases.h"
#include "coverage.h"

namespace kernels_driver {

struct RunOptions {
  bool unwritten = false;  // results and workspace are as cudaMalloc gives them; else they start as poison
  std::string spoil;       // changes one value of the result of this name before it is looked at
};

struct Outcome {
  std::vector<std::string> wrong;  // a sentence each
  std::vector<Launched> launched;
};

Outcome run(const Case& c, const bn_ext::cuda::Machine& device, const RunOptions& options);

}  // namespace kernels_driver
