// The data behind bn_ext.explain: the launch plans of a batch norm on a CUDA device. Every build has it.
#pragma once

#include <c10/core/ScalarType.h>

#include <map>
#include <string>
#include <utility>
#include <variant>

#include "batch_norm.h"

namespace bn_ext {

// Facts of one pass; bn_ext/explain.py describes each of them.
using Facts = std::map<std::string, std::variant<int64_t, std::string>>;

// Returns the facts of the forward and the backward pass for a non-empty activation tensor (n, c, s) that is aligned to
// 16 bytes. Backward computes all gradients. Throws if the activation or dtype is unknown.
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
