// What bn_ext.explain tells of a batch norm on a CUDA device, in names and numbers. In every build.
#pragma once

#include <c10/core/ScalarType.h>

#include <map>
#include <string>
#include <utility>
#include <variant>

#include "batch_norm.h"

namespace bn_ext {

// Of one pass; bn_ext/explain.py says what each of them is.
using Facts = std::map<std::string, std::variant<int64_t, std::string>>;

// Forward and backward of an activation tensor (n, c, s) aligned to 16 bytes, which is not empty, with gradients of all
// that there is. Throws for an unknown activation or dtype.
std::pair<Facts, Facts> explain(int64_t n,
                                int64_t c,
                                int64_t s,
                                bool channels_last,
                                at::ScalarType dtype,
                                bool training,
                                OptionalName activation,
                                double activation_parameter,
                                bool residual,
                                int multiprocessors,
                                int shared_bytes,
                                bool clusters);

}  // namespace bn_ext
