// Inputs of a case, and what its kernels must make of them: computed on the host from the formulas, in more digits.
#pragma once

#include <map>
#include <string>

#include "cases.h"

namespace kernels_driver {

struct Inputs {
  Values x;   // in the order in which they lie, rounded to their dtype
  Values z;   // empty where the case has none
  Values dy;  // zero near kinks, where rounding decides which derivative it is
  Values weight;
  Values bias;
  Values running_mean;
  Values running_var;
  int64_t num_batches_tracked = 3;
};

struct Result {
  Values values;
  Values errors;  // the largest that are allowed
};

struct Reference {
  std::map<std::string, Result> results;  // by their names in ForwardParams and BackwardParams
  std::vector<bool> passed;               // what a mask tells, ...
  std::vector<bool> near_kink;            // ... but here it may tell either
};

constexpr double kMomentum = 0.1;
constexpr double kEps = 1e-5;

// Random, from the case's seed.
Inputs make_inputs(const Case& c);

// Clears dy near kinks.
Reference make_reference(const Case& c, Inputs& inputs);

}  // namespace kernels_driver
