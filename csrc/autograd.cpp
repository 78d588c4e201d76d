// The public operator: a torch::autograd::Function around the inner operators, which it calls through the dispatcher
// so that compilers, fake tensors and other modes see them.
#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include "checks.h"
#include "composed.h"

namespace bn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

ThreeTensors dispatch_forward(const BatchNormArguments& a) {
  if (a.training) {
    static const auto op = operator_handle<decltype(batch_norm_forward)>("bn_ext::batch_norm_forward");
    return op.call(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.num_batches_tracked, a.momentum, a.eps);
  }
  static const auto op = operator_handle<decltype(batch_norm_inference)>("bn_ext::batch_norm_inference");
  return op.call(a.input, a.weight, a.bias, *a.running_mean, *a.running_var, a.eps);
}

ThreeTensors dispatch_backward(const at::Tensor& dy,
                               const at::Tensor& input,
                               const OptionalTensor& weight,
                               const at::Tensor& mean,
                               const at::Tensor& rstd,
                               bool training,
                               std::array<bool, 3> output_mask) {
  static const auto op = operator_handle<decltype(batch_norm_backward)>("bn_ext::batch_norm_backward");
  return op.call(dy, input, weight, mean, rstd, training, output_mask);
}

// Saved for backward: input, weight and two vectors of statistics.
void save(AutogradContext* ctx, const BatchNormArguments& args, const at::Tensor& mean, const at::Tensor& rstd) {
  ctx->save_for_backward({args.input, args.weight.value_or(at::Tensor()), mean, rstd});
  ctx->saved_data["training"] = args.training;
  ctx->saved_data["eps"] = args.eps;
  ctx->saved_data["has_bias"] = args.bias.has_value() && args.bias->defined();
  ctx->set_materialize_grads(false);
}

// Gradients of input, weight and bias, followed by undefined ones: `arguments` in all.
variable_list backward_of_saved(AutogradContext* ctx, const at::Tensor& dy, size_t arguments) {
  variable_list result(arguments);
  if (!dy.defined()) return result;
  const variable_list saved = ctx->get_saved_variables();
  const at::Tensor& input = saved[0];
  const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
  const bool training = ctx->saved_data["training"].toBool();
  // Absent tensors have no edge.
  const bool has_bias = ctx->saved_data["has_bias"].toBool();
  const std::array<bool, 3> mask{ctx->needs_input_grad(0),
                                 weight.has_value() && ctx->needs_input_grad(1),
                                 has_bias && ctx->needs_input_grad(weight.has_value() ? 2 : 1)};
  const bool is_differentiated = at::GradMode::is_enabled() || has_forward_gradient(dy);
  const auto [dx, dweight, dbias] =
      is_differentiated
          ? composed_backward(dy, input, weight, saved[2], saved[3], training, ctx->saved_data["eps"].toDouble(), mask)
          : dispatch_backward(dy, input, weight, saved[2], saved[3], training, mask);
  if (mask[0]) result[0] = dx;
  if (mask[1]) result[1] = dweight.view_as(*weight);
  if (mask[2]) result[2] = dbias;
  return result;
}

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& input,
                            const OptionalTensor& weight,
                            const OptionalTensor& bias,
                            const OptionalTensor& running_mean,
                            const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked,
                            bool training,
                            std::optional<double> momentum,
                            double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const BatchNormArguments args{
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked};
    const auto [y, mean, rstd] = dispatch_forward(args);
    save(ctx, args, mean, rstd);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_saved(ctx, grads[0], 9);
  }
};

// The inner operator of eval, where it is called as such: in an exported and decomposed model.
struct InferenceFunction : torch::autograd::Function<InferenceFunction> {
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& input,
                               const OptionalTensor& weight,
                               const OptionalTensor& bias,
                               const at::Tensor& running_mean,
                               const at::Tensor& running_var,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const OptionalTensor mean_given(running_mean), var_given(running_var), no_count;
    const BatchNormArguments args{input, mean_given, var_given, weight, bias, false, 0.0, eps, no_count};
    const auto [y, mean, rstd] = dispatch_forward(args);
    save(ctx, args, mean, rstd);
    ctx->mark_non_differentiable({mean, rstd});
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_saved(ctx, grads[0], 6);
  }
};

ThreeTensors differentiable_inference(const at::Tensor& input,
                                      const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const at::Tensor& running_mean,
                                      const at::Tensor& running_var,
                                      double eps) {
  const variable_list result = InferenceFunction::apply(input, weight, bias, running_mean, running_var, eps);
  return {result[0], result[1], result[2]};
}

bool requires_grad(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

// num_batches_tracked.add_(1) in torch.nn counts as a change in place; the running statistics' update there does not.
void count_as_changed(const OptionalTensor& tensor) {
  if (tensor.has_value() && tensor->defined() && !tensor->is_inference()) {
    tensor->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

at::Tensor batch_norm(const at::Tensor& input,
                      const OptionalTensor& running_mean,
                      const OptionalTensor& running_var,
                      const OptionalTensor& weight,
                      const OptionalTensor& bias,
                      bool training,
                      std::optional<double> momentum,
                      double eps,
                      const OptionalTensor& num_batches_tracked) {
  const BatchNormArguments args{
      input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked};
  check_arguments(args);
  if (needs_composed(args)) return composed_batch_norm(args);
  if (at::GradMode::is_enabled()) {
    check_not_differentiable(running_mean, "running_mean");
    check_not_differentiable(running_var, "running_var");
  }
  at::Tensor y;
  if (at::GradMode::is_enabled() && (input.requires_grad() || requires_grad(weight) || requires_grad(bias))) {
    check_can_be_saved(input, "input");
    check_can_be_saved(weight, "weight");
    y = BatchNormFunction::apply(
        input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = std::get<0>(dispatch_forward(args));
  }
  if (training) count_as_changed(num_batches_tracked);
  return y;
}

at::Tensor batch_norm_from_python(const at::Tensor& input,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var,
                                  const OptionalTensor& weight,
                                  const OptionalTensor& bias,
                                  bool training,
                                  std::optional<double> momentum,
                                  double eps,
                                  const OptionalTensor& num_batches_tracked) {
  if (!torch::jit::tracer::isTracing()) {
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked);
  }
  // The tracer records what the dispatcher sees.
  static const auto op = operator_handle<decltype(batch_norm)>("bn_ext::batch_norm");
  return op.call(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked);
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) { m.impl("batch_norm", &batch_norm); }

TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) { m.impl("batch_norm_inference", &differentiable_inference); }

// vmap does not decompose operators that write to their arguments, unless told to.
TORCH_LIBRARY_IMPL(bn_ext, FuncTorchBatchedDecomposition, m) { m.impl("batch_norm", &batch_norm); }

}  // namespace bn_ext
