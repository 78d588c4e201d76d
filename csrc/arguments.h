// What a call of batch_norm is given.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "activation.h"

namespace bn_ext {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalFormat = std::optional<at::MemoryFormat>;

// Torch returns such an input, whatever the other arguments are.
bool is_empty(const at::Tensor& input);

inline bool is_defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// The memory format of the result: of several that input is dense in, the first; torch.nn's choice on the CPU.
at::MemoryFormat memory_format_of(const at::Tensor& input);

// Throws for a type that the kernels do not have.
DType dtype_of(at::ScalarType type);

// Training forward passes that leave running statistics as they are; off unless asked for.
struct Skip {
  bool nonfinite;   // of a channel, what would make its running statistics inf or NaN
  bool recomputed;  // all of a forward pass within a backward pass, as the second one of torch.utils.checkpoint is
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
  const OptionalTensor& num_batches_tracked;  // one value, int64 as a rule
  const OptionalTensor& residual;             // as input
  NamedActivation activation;
  Skip skip;
};

// The same with other vectors, which must live on; and for a training forward pass that updates no statistics.
BatchNormArguments with_parameters(const BatchNormArguments& args,
                                   const OptionalTensor& weight,
                                   const OptionalTensor& bias);
BatchNormArguments with_statistics(const BatchNormArguments& args,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var);
BatchNormArguments without_updates(const BatchNormArguments& args);
// With this momentum, and no count to raise.
BatchNormArguments without_count(const BatchNormArguments& args, double momentum);

// The momentum of a mean over all batches, of which `count` have been seen before this one. Throws for -1, as Python's
// division in torch.nn does.
double cumulative_momentum(const at::Tensor& count);

// Whether this is a forward pass that leaves running statistics and num_batches_tracked alone.
bool skips_this_pass(const Skip& skip);

}  // namespace bn_ext
