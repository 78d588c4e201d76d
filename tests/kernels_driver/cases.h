// What is run: calls that together take every kernel, in every way it can be taken.
#pragma once

#include <string>
#include <vector>

#include "activations.h"
#include "paths.h"

namespace kernels_driver {

// Of the gradients.
struct Wanted {
  bool dx = true;
  bool dz = true;  // where there is one that differs from dy
  bool dweight = true;
  bool dbias = true;
};

// A forward pass, the same once more from what it saved, and a backward pass.
struct Case {
  Path path;
  DType dtype;
  DType params_dtype;
  bn_ext::Shape shape;
  size_t misalignment;  // of activation tensors, in bytes
  NamedActivation activation;
  bool training = true;
  bool has_residual = false;
  bool has_mask = false;        // for the backward pass
  bool has_params = true;       // weight, bias and running statistics
  bool cumulative = false;      // running statistics are the mean over all batches
  bool skip_nonfinite = false;  // see ForwardParams
  bool huge = false;            // squares of x are beyond float32
  bool dy_is_scalar = false;
  Wanted wanted;
  unsigned seed = 0;

  std::string name() const;
};

std::vector<Case> all_cases(const bn_ext::cuda::Machine& device);

}  // namespace kernels_driver
