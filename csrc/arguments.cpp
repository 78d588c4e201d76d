// See arguments.h.
#include "arguments.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

namespace bn_ext {

at::MemoryFormat memory_format_of(const at::Tensor& input) {
  // A dimension of size 1 may have any stride, so suggest_memory_format() alone misses some channels_last tensors.
  for (const auto format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast3d, at::MemoryFormat::ChannelsLast}) {
    if (input.is_contiguous(format)) return format;
  }
  return input.suggest_memory_format();
}

bool is_empty(const at::Tensor& input) { return TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0)); }

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", type, "'");
  }
}

namespace {

BatchNormArguments with_vectors(const BatchNormArguments& a,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& num_batches_tracked) {
  return {a.input,
          running_mean,
          running_var,
          weight,
          bias,
          a.training,
          a.momentum,
          a.eps,
          num_batches_tracked,
          a.residual,
          a.activation,
          a.skip};
}

}  // namespace

BatchNormArguments with_parameters(const BatchNormArguments& a,
                                   const OptionalTensor& weight,
                                   const OptionalTensor& bias) {
  return with_vectors(a, a.running_mean, a.running_var, weight, bias, a.num_batches_tracked);
}

BatchNormArguments with_statistics(const BatchNormArguments& a,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var) {
  return with_vectors(a, running_mean, running_var, a.weight, a.bias, a.num_batches_tracked);
}

BatchNormArguments without_updates(const BatchNormArguments& a) {
  static const OptionalTensor none;
  return with_vectors(a, none, none, a.weight, a.bias, none);
}

BatchNormArguments without_count(const BatchNormArguments& a, double momentum) {
  static const OptionalTensor none;
  return {a.input,
          a.running_mean,
          a.running_var,
          a.weight,
          a.bias,
          a.training,
          momentum,
          a.eps,
          none,
          a.residual,
          a.activation,
          a.skip};
}

}  // namespace bn_ext
