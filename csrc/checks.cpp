// Every error that a user can cause; see checks.h.
#include "checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <cmath>
#include <string>

namespace bn_ext {
namespace {

void check_dimensions(const at::Tensor& input) {
  TORCH_CHECK(input.dim() >= 2, "input must have at least 2 dimensions (N, C, ...), got ", input.dim(), "D input");
}

void check_values_per_channel(const at::Tensor& input) {
  c10::SymInt values = input.sym_size(0);
  for (int64_t i = 2; i < input.dim(); ++i) values = values * input.sym_size(i);
  TORCH_CHECK_VALUE(!TORCH_GUARD_OR_FALSE(values.sym_eq(1)),
                    "Expected more than 1 value per channel when training, got input size torch.Size(",
                    input.sym_sizes(),
                    ")");
}

// Formats a float as Python prints it.
std::string printed(double value) {
  const double size = std::abs(value);
  const bool has_exponent = size != 0 && (size < 1e-4 || size >= 1e16);
  const auto format = has_exponent ? std::chars_format::scientific : std::chars_format::fixed;
  char digits[64];
  std::string result(digits, std::to_chars(digits, digits + sizeof(digits), value, format).ptr);
  if (std::isfinite(value) && result.find_first_of(".e") == std::string::npos) result += ".0";
  return result;
}

void check_eps(double eps, bool training) {
  TORCH_CHECK_VALUE(!(training && eps <= 0), "batch_norm eps must be positive during training, but got ", printed(eps));
  TORCH_CHECK_VALUE(!(eps < 0), "batch_norm eps must be non-negative, but got ", printed(eps));
}

void check_elements(const at::Tensor& input, const OptionalTensor& tensor, const char* name) {
  if (!is_defined(tensor)) return;
  TORCH_SYM_CHECK(tensor->sym_numel().sym_eq(input.sym_size(1)),
                  name,
                  " should contain ",
                  input.sym_size(1),
                  " elements not ",
                  tensor->sym_numel());
}

void check_is_vector(const OptionalTensor& tensor, const char* name) {
  if (!is_defined(tensor)) return;
  TORCH_CHECK(
      tensor->dim() == 1, name, " must have one dimension, got shape ", tensor->sym_sizes(), ": call flatten() on it");
}

// Follows torch's order: first all sizes, then all other checks.
void check_sizes(const BatchNormArguments& args) {
  TORCH_CHECK(args.training || is_defined(args.running_mean), "running_mean must be defined in evaluation mode");
  check_elements(args.input, args.running_mean, "running_mean");
  TORCH_CHECK(args.training || is_defined(args.running_var), "running_var must be defined in evaluation mode");
  check_elements(args.input, args.running_var, "running_var");
  check_elements(args.input, args.weight, "weight");
  check_elements(args.input, args.bias, "bias");
}

void check_running_statistics(const BatchNormArguments& args) {
  const bool mean = is_defined(args.running_mean);
  const bool var = is_defined(args.running_var);
  TORCH_CHECK_VALUE(mean == var, "running_mean and running_var must either both be None or neither be None");
  check_is_vector(args.running_mean, "running_mean");
  check_is_vector(args.running_var, "running_var");
  TORCH_CHECK_VALUE(!args.training || !mean || args.momentum.has_value() || is_defined(args.num_batches_tracked),
                    "momentum=None (the mean over all batches) requires num_batches_tracked, got None");
  TORCH_CHECK(!args.training || !mean || !(args.running_mean->is_neg() || args.running_var->is_neg()),
              "running_mean and running_var cannot be updated as lazily negated views: call resolve_neg() on them");
}

const char* parameter_type_of(const at::Tensor& input) {
  return c10::toString(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

void check_input_dtype(const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(input.scalar_type()) && !at::isFloat8Type(input.scalar_type()),
                              "\"batch_norm\" not implemented for '",
                              input.scalar_type(),
                              "': input must be float32, float64, float16 or bfloat16");
}

void check_same_device(const at::Tensor& input, const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device() == input.device(),
              "Expected all tensors to be on the same device, but input is on ",
              input.device(),
              " and ",
              name,
              " is on ",
              tensor.device());
}

// Checks one per-channel vector. All of them share one dtype: the input's, or float32 for 16-bit input.
void check_channel_vector(const at::Tensor& input,
                          const OptionalTensor& tensor,
                          const char* name,
                          std::optional<at::ScalarType>& shared) {
  if (!is_defined(tensor)) return;
  check_same_device(input, *tensor, name);
  const at::ScalarType dtype = tensor->scalar_type();
  const bool is_half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK(dtype == input.scalar_type() || (is_half && dtype == at::kFloat),
              "mixed dtype: expect parameter to have scalar type of ",
              parameter_type_of(input),
              " for input of ",
              input.scalar_type(),
              ", got ",
              name,
              " of ",
              dtype);
  TORCH_CHECK(!shared.has_value() || *shared == dtype,
              "expected scalar type ",
              shared.value_or(dtype),
              " but found ",
              dtype,
              ": weight, bias, running_mean and running_var must have one dtype, got ",
              name,
              " of ",
              dtype);
  shared = dtype;
}

void check_vectors(const BatchNormArguments& args) {
  check_sizes(args);
  check_running_statistics(args);
  check_input_dtype(args.input);
  std::optional<at::ScalarType> shared;
  check_channel_vector(args.input, args.running_mean, "running_mean", shared);
  check_channel_vector(args.input, args.running_var, "running_var", shared);
  check_channel_vector(args.input, args.weight, "weight", shared);
  check_channel_vector(args.input, args.bias, "bias", shared);
}

}  // namespace

void check_arguments(const BatchNormArguments& args) {
  if (!is_empty(args.input)) check_dimensions(args.input);
  if (args.training) check_values_per_channel(args.input);
  check_eps(args.eps, args.training);
  if (!is_empty(args.input)) check_vectors(args);
  check_residual(args.input, args.residual);
  parse(args.activation);
}

void check_not_differentiable(const OptionalTensor& tensor, const char* name) {
  TORCH_CHECK(!is_defined(tensor) || !tensor->requires_grad(),
              "The function 'batch_norm' is not differentiable with respect to argument '",
              name,
              "'. This input cannot have requires_grad True.");
}

void check_can_be_raised(const OptionalTensor& count) {
  TORCH_CHECK(!is_defined(count) || !count->requires_grad() || !count->is_leaf(),
              "a leaf Variable that requires grad is being used in an in-place operation. (num_batches_tracked)");
}

void check_can_be_saved(const OptionalTensor& tensor, const char* name) {
  TORCH_CHECK(!is_defined(tensor) || !tensor->is_inference(),
              "Inference tensors cannot be saved for backward. To work around you can make a clone to get a normal "
              "tensor and use it in autograd. (",
              name,
              ")");
}

void check_residual(const at::Tensor& input, const OptionalTensor& residual) {
  if (!is_defined(residual)) return;
  bool is_alike = residual->dim() == input.dim();
  for (int64_t i = 0; is_alike && i < input.dim(); ++i) {
    is_alike = TORCH_GUARD_OR_TRUE(residual->sym_size(i).sym_eq(input.sym_size(i)));
  }
  TORCH_CHECK(is_alike, "residual must have the shape of input ", input.sym_sizes(), ", got ", residual->sym_sizes());
  check_same_device(input, *residual, "residual");
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(),
              "residual must have the dtype of input (",
              input.scalar_type(),
              "), got ",
              residual->scalar_type());
}

namespace {

void check_mask_format(at::MemoryFormat format, int64_t dimensions) {
  TORCH_CHECK(format == at::MemoryFormat::Contiguous || (format == at::MemoryFormat::ChannelsLast && dimensions == 4) ||
                  (format == at::MemoryFormat::ChannelsLast3d && dimensions == 5),
              "mask_format must be torch.contiguous_format, torch.channels_last for 4 dimensions or "
              "torch.channels_last_3d for 5, got another memory format for an input with ",
              dimensions,
              " dimensions");
}

}  // namespace

void check_mask(const BatchNormArguments& args, OptionalFormat mask_format) {
  if (mask_format.has_value()) check_mask_format(*mask_format, args.input.dim());
  TORCH_CHECK(!mask_format.has_value() || parse(args.activation).kind == ActivationKind::kReluLike,
              "mask_format requires the activation relu, leaky_relu or relu6, got ",
              args.activation.name.value_or("None"));
}

void check_saved(const at::Tensor& input, const at::Tensor& saved) {
  check_dimensions(input);
  check_input_dtype(input);
  const at::ScalarType type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(saved.dim() == 2 && saved.size(0) == 4 && saved.size(1) == input.size(1) && saved.scalar_type() == type &&
                  saved.device() == input.device(),
              "saved must be the tensor that the forward pass returned, (4, ",
              input.size(1),
              ") of ",
              type,
              " on ",
              input.device(),
              ", got ",
              saved.sizes(),
              " of ",
              saved.scalar_type(),
              " on ",
              saved.device());
}

void check_backward(const at::Tensor& dy,
                    const at::Tensor& input,
                    const OptionalTensor& weight,
                    const at::Tensor& saved,
                    const OptionalTensor& residual,
                    const OptionalTensor& mask,
                    OptionalFormat mask_format) {
  check_saved(input, saved);
  check_elements(input, weight, "weight");
  std::optional<at::ScalarType> shared;
  check_channel_vector(input, weight, "weight", shared);
  check_residual(input, residual);
  TORCH_CHECK(!is_defined(mask) || (mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                                    mask->numel() == mask_bytes(input.numel()) && mask->device() == input.device()),
              "mask must be the tensor that the forward pass returned, ",
              mask_bytes(input.numel()),
              " bytes on ",
              input.device(),
              ", got ",
              is_defined(mask) ? mask->numel() : 0,
              " of ",
              is_defined(mask) ? mask->scalar_type() : at::kByte);
  TORCH_CHECK(!is_defined(mask) || mask_format.has_value(),
              "mask requires the mask_format that the forward pass was called with, got None");
  if (is_defined(mask)) check_mask_format(*mask_format, input.dim());
  TORCH_CHECK(
      dy.sizes() == input.sizes(), "grad_output must have the shape of input ", input.sizes(), ", got ", dy.sizes());
  TORCH_CHECK(dy.scalar_type() == input.scalar_type() && dy.device() == input.device(),
              "grad_output must have the dtype and device of input (",
              input.scalar_type(),
              ", ",
              input.device(),
              "), got ",
              dy.scalar_type(),
              ", ",
              dy.device());
}

}  // namespace bn_ext
