// The activations that cases go through, with formulas of their own: those of the kernels are what is tested.
#pragma once

#include <vector>

#include "numbers.h"

namespace kernels_driver {

struct NamedActivation {
  const char* name;
  bn_ext::Activation activation;
  std::vector<double> kinks;  // where the derivative jumps
};

// No activation.
const NamedActivation& identity();
// relu and its like.
const std::vector<NamedActivation>& relu_likes();
// One of each other kind.
const std::vector<NamedActivation>& others();

Real value_of(const bn_ext::Activation& activation, Real u);
Real derivative_of(const bn_ext::Activation& activation, Real u);

}  // namespace kernels_driver
