// The arguments of batch_norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "activation.h"

namespace bn_ext {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalFormat = std::optional<at::MemoryFormat>;

// Torch returns an empty input without checking the other arguments.
bool is_empty(const at::Tensor& input);

inline bool is_defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// Returns the memory format of the result: the first one in which input is dense, as torch.nn chooses it on the CPU.
at::MemoryFormat memory_format_of(const at::Tensor& input);

// Throws if the kernels do not support the type.
DType dtype_of(at::ScalarType type);

// Which training forward passes do not update running statistics. Both are off by default.
struct Skip {
  bool nonfinite;   // skip a channel if its running statistics would become inf or NaN
  bool recomputed;  // skip a forward pass that runs within a backward pass, as torch.utils.checkpoint's second one does
};

struct BatchNormArguments {
  const at::Tensor& input;             // (N, C, ...)
  const OptionalTensor& running_mean;  // (C,)
  const OptionalTensor& running_var;   // (C,)
  const OptionalTensor& weight;        // (C,)
  const OptionalTensor& bias;          // (C,)
  bool training;
  std::optional<double> momentum;
  double eps;
  const OptionalTensor& num_batches_tracked;  // one value, usually int64
  const OptionalTensor& residual;             // shape and dtype of input
  NamedActivation activation;
  Skip skip;
};

// Variants of `args`. They refer to the given vectors, which must outlive them. without_updates updates no statistics.
BatchNormArguments with_parameters(const BatchNormArguments& args,
                                   const OptionalTensor& weight,
                                   const OptionalTensor& bias);
BatchNormArguments with_statistics(const BatchNormArguments& args,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var);
BatchNormArguments without_updates(const BatchNormArguments& args);
// With this momentum and without num_batches_tracked.
BatchNormArguments without_count(const BatchNormArguments& args, double momentum);

// Returns the momentum for a mean over all batches, if `count` batches came before this one. Throws for -1, as Python's
// division in torch.nn does.
double cumulative_momentum(const at::Tensor& count);

// Whether the current forward pass must not update running statistics and num_batches_tracked.
bool skips_this_pass(const Skip& skip);

}  // namespace bn_ext
