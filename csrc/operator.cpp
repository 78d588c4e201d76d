// The public operator: checks its arguments, then chooses how to compute the result; see operator.h.
#include "operator.h"

#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <type_traits>

#include "autograd.h"
#include "checks.h"
#include "composed.h"
#include "dispatch.h"

namespace bn_ext {
namespace {

bool requires_grad(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

// In torch.nn, num_batches_tracked.add_(1) is an in-place change for autograd; the running statistics' update is not.
void count_as_changed(const OptionalTensor& tensor) {
  if (tensor.has_value() && tensor->defined() && !tensor->is_inference()) {
    tensor->unsafeGetTensorImpl()->bump_version();
  }
}

// Whether the count is on a device on which the operator does not run, such as meta if input is real. An inner operator
// must not get it, because the dispatcher would run that device's kernel.
bool is_counted_apart(const BatchNormArguments& a) {
  if (!a.training || !is_defined(a.num_batches_tracked)) return false;
  const auto of_count = a.num_batches_tracked->device().type(), of_input = a.input.device().type();
  const auto has_kernels = [](at::DeviceType device) { return device == at::kCPU || device == at::kCUDA; };
  return of_count != of_input && !(has_kernels(of_count) && has_kernels(of_input));
}

// Whether torch's operator computes the same. torch.jit.freeze and other TorchScript passes know no other batch norm.
bool is_torchs(const BatchNormArguments& a) {
  const bool is_plain = !a.activation.name.has_value() && !is_defined(a.residual);
  return is_plain && !(a.training && (!a.momentum.has_value() || a.skip.nonfinite || a.skip.recomputed));
}

TensorAndSaved run_alike(const BatchNormArguments& a);

// As torch.nn does: a separate operator increments the count, and momentum=None reads it.
TensorAndSaved run_counted_apart(const BatchNormArguments& a) {
  const at::Tensor& count = *a.num_batches_tracked;
  if (skips_this_pass(a.skip)) return run_alike(without_count(a, 0));
  const double momentum = a.momentum.has_value() ? *a.momentum : cumulative_momentum(count);
  const TensorAndSaved result = run_alike(without_count(a, momentum));
  count.add_(1);
  return result;
}

// Returns y and, if available, the saved statistics for batch_norm_repeat.
TensorAndSaved run_alike(const BatchNormArguments& a) {
  check_arguments(a);
  const bool is_recorded = at::tracer::impl::is_dispatch_enabled() && is_torchs(a);
  if (needs_composed(a) || is_empty(a.input) || is_recorded) return {composed_batch_norm(a), at::Tensor()};
  if (is_counted_apart(a)) return run_counted_apart(a);
  if (at::GradMode::is_enabled()) {
    check_not_differentiable(a.running_mean, "running_mean");
    check_not_differentiable(a.running_var, "running_var");
    if (a.training) check_can_be_raised(a.num_batches_tracked);
  }
  TensorAndSaved result;
  if (at::GradMode::is_enabled() &&
      (a.input.requires_grad() || requires_grad(a.weight) || requires_grad(a.bias) || requires_grad(a.residual))) {
    check_can_be_saved(a.input, "input");
    check_can_be_saved(a.weight, "weight");
    if (saves_u(a)) {
      check_can_be_saved(a.bias, "bias");
      check_can_be_saved(a.residual, "residual");
    }
    result = differentiable_batch_norm(a);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, saved, mask] = dispatch_forward(a, /*mask_format=*/std::nullopt);
    result = {y, saved};
  }
  if (a.training && !skips_this_pass(a.skip)) count_as_changed(a.num_batches_tracked);
  return result;
}

bool is_of(at::ScalarType type, const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->scalar_type() == type;
}

bool has_another_shape(const OptionalTensor& parameter) { return is_defined(parameter) && parameter->dim() > 1; }

// The kernels need (C,) vectors of one dtype. FSDP's mixed precision makes parameters 16-bit but not buffers, so such
// parameters are converted to float32. Weight and bias of several dimensions are flattened, but not their gradients.
TensorAndSaved run(const BatchNormArguments& a) {
  if (has_another_shape(a.weight) || has_another_shape(a.bias)) {
    const auto flat = [](const OptionalTensor& parameter) {
      return has_another_shape(parameter) ? parameter->flatten() : parameter;
    };
    return run(with_parameters(a, flat(a.weight), flat(a.bias)));
  }
  const at::ScalarType type = a.input.scalar_type();
  const bool is_narrow = (type == at::kHalf || type == at::kBFloat16) && is_of(at::kFloat, a.running_mean);
  const auto widened = [&](const OptionalTensor& tensor) {
    return is_of(type, tensor) ? tensor->to(at::kFloat) : tensor;
  };
  if (is_narrow && (is_of(type, a.weight) || is_of(type, a.bias))) {
    return run_alike(with_parameters(a, widened(a.weight), widened(a.bias)));
  }
  return run_alike(a);
}

}  // namespace

at::Tensor activate(const at::Tensor& input, std::string_view activation, double activation_parameter) {
  return composed_activation(input, parse({activation, activation_parameter}));
}

at::Tensor batch_norm(const at::Tensor& input,
                      const OptionalTensor& running_mean,
                      const OptionalTensor& running_var,
                      const OptionalTensor& weight,
                      const OptionalTensor& bias,
                      bool training,
                      std::optional<double> momentum,
                      double eps,
                      const OptionalTensor& num_batches_tracked,
                      const OptionalTensor& residual,
                      OptionalName activation,
                      double activation_parameter,
                      bool skip_nonfinite,
                      bool skip_recomputed) {
  return std::get<0>(run({input,
                          running_mean,
                          running_var,
                          weight,
                          bias,
                          training,
                          momentum,
                          eps,
                          num_batches_tracked,
                          residual,
                          {activation, activation_parameter},
                          {skip_nonfinite, skip_recomputed}}));
}

template <typename Result>
Result batch_norm_from_python(const at::Tensor& input,
                              const OptionalTensor& running_mean,
                              const OptionalTensor& running_var,
                              const OptionalTensor& weight,
                              const OptionalTensor& bias,
                              bool training,
                              std::optional<Number> momentum,
                              Number eps,
                              const OptionalTensor& num_batches_tracked,
                              const OptionalTensor& residual,
                              OptionalName activation,
                              double activation_parameter,
                              bool skip_nonfinite,
                              bool skip_recomputed) {
  const BatchNormArguments args{input,
                                running_mean,
                                running_var,
                                weight,
                                bias,
                                training,
                                momentum,
                                eps,
                                num_batches_tracked,
                                residual,
                                {activation, activation_parameter},
                                {skip_nonfinite, skip_recomputed}};
  TensorAndSaved result;
  if (!at::tracer::impl::is_dispatch_enabled() || is_torchs(args)) {
    result = run(args);
  } else {  // the tracer records calls of the dispatcher
    std::get<0>(result) = dispatch_batch_norm(args);
  }
  if constexpr (std::is_same_v<Result, at::Tensor>) {
    return std::get<0>(result);
  } else {
    return result;
  }
}

template decltype(batch_norm_from_python<at::Tensor>) batch_norm_from_python<at::Tensor>;
template decltype(batch_norm_from_python<TensorAndSaved>) batch_norm_from_python<TensorAndSaved>;

}  // namespace bn_ext
