// torch::autograd::Function around the inner operators. Torch's header for it takes the longest to compile, so this
// file contains only code that needs it.
#include "autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "checks.h"
#include "composed.h"
#include "dispatch.h"

namespace bn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Returns zero as a function of every input of the node that runs. The gradient of relu-like activations depends only
// on whether a value passes. Torch returns zero for its derivative, not an undefined tensor.
at::Tensor zero_of_inputs(const at::TensorOptions& options) {
  at::Tensor zero = at::zeros({}, options);
  for (const auto& edge : torch::autograd::get_current_node()->next_edges()) {
    if (!edge.is_valid()) continue;
    const auto& input = edge.function->input_metadata(edge.input_nr);
    const auto sizes = input.shape_as_dim_vector();
    // Represents the input in the graph, without memory.
    const at::Tensor stand_in =
        at::empty_strided_symint(sizes, std::vector<c10::SymInt>(sizes.size()), input.options());
    torch::autograd::impl::set_gradient_edge(stand_in, edge);
    zero = zero + stand_in.unsqueeze(0).narrow(0, 0, 0).sum().to(options);
  }
  return zero;
}

bool is_traced() {
  using c10::impl::TorchDispatchModeKey, c10::impl::TorchDispatchModeTLS;
  return TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::FUNCTIONAL).has_value() ||
         TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::PROXY).has_value();
}

// Whether a compiler traces this call and is likely to make the input channels_last. Inductor does so between
// convolutions; on a GPU, only if no size is symbolic.
bool may_become_channels_last(const at::Tensor& input) {
  if (!is_traced() || input.dim() < 4) return false;
  const auto sizes = input.sym_sizes();
  const bool is_open =
      std::any_of(sizes.begin(), sizes.end(), [](const c10::SymInt& size) { return size.is_symbolic(); });
  return !(input.is_cuda() && is_open) && memory_format_of(input) == at::MemoryFormat::Contiguous;
}

// With a residual, relu, leaky_relu and relu6 need only one bit per value in backward. The order of the bits is that of
// the current memory format, to which the operators copy an input in another one. If that is likely, save the residual.
OptionalFormat mask_format_of(const BatchNormArguments& args) {
  if (!is_defined(args.residual) || parse(args.activation).kind != ActivationKind::kReluLike) return std::nullopt;
  if (may_become_channels_last(args.input)) return std::nullopt;
  return memory_format_of(args.input);
}

// Saved as one number, because each entry of saved_data takes time to create and to find. mask_format is saved because
// saved-tensor hooks may return input in another memory format.
struct Flags {
  bool training;
  bool has_bias;
  bool has_residual;
  OptionalFormat mask_format;

  int64_t packed() const {
    const int64_t format = mask_format.has_value() ? static_cast<int64_t>(*mask_format) + 1 : 0;
    return int64_t(training) | int64_t(has_bias) << 1 | int64_t(has_residual) << 2 | format << 3;
  }
  static Flags of(int64_t packed) {
    const int64_t format = packed >> 3;
    const auto mask_format = format == 0 ? std::nullopt : OptionalFormat(static_cast<at::MemoryFormat>(format - 1));
    return {(packed & 1) != 0, (packed & 2) != 0, (packed & 4) != 0, mask_format};
  }
};

// Saves for backward: input, weight and saved statistics. With an activation, also the mask or, without a mask, bias
// (for derivatives of higher order) and the residual.
void save(AutogradContext* ctx,
          const BatchNormArguments& args,
          const at::Tensor& saved,
          const at::Tensor& mask,
          OptionalFormat mask_format) {
  const bool has_mask = mask_format.has_value();
  const bool has_activation = args.activation.name.has_value();
  const auto if_needed = [](bool needed, const OptionalTensor& tensor) {
    return needed ? tensor.value_or(at::Tensor()) : at::Tensor();
  };
  variable_list tensors{args.input, args.weight.value_or(at::Tensor()), saved};
  if (has_activation) {
    tensors.push_back(if_needed(!has_mask, args.bias));
    tensors.push_back(if_needed(!has_mask, args.residual));
    tensors.push_back(has_mask ? mask : at::Tensor());
  }
  ctx->save_for_backward(std::move(tensors));
  const Flags flags{args.training, is_defined(args.bias), is_defined(args.residual), mask_format};
  ctx->saved_data["flags"] = flags.packed();
  if (args.training) ctx->saved_data["eps"] = args.eps;
  if (has_activation) {
    ctx->saved_data["activation"] = std::string(*args.activation.name);
    ctx->saved_data["activation_parameter"] = args.activation.parameter;
  }
  ctx->set_materialize_grads(false);
}

// Returns the gradients of input, weight, bias and residual, followed by undefined ones: `arguments` in total.
variable_list backward_of_saved(AutogradContext* ctx, const at::Tensor& dy, size_t arguments) {
  variable_list result(arguments);
  if (!dy.defined()) return result;
  variable_list saved = ctx->get_saved_variables();
  const Flags flags = Flags::of(ctx->saved_data["flags"].toInt());
  std::string name;
  NamedActivation activation{std::nullopt, 0};
  if (ctx->saved_data.count("activation") > 0) {
    name = ctx->saved_data["activation"].toStringRef();
    activation = {name, ctx->saved_data["activation_parameter"].toDouble()};
  }
  saved.resize(6);  // without an activation there are only three
  const SavedForBackward s{std::move(saved[0]),
                           std::move(saved[1]),
                           std::move(saved[3]),
                           std::move(saved[4]),
                           std::move(saved[2]),
                           std::move(saved[5]),
                           flags.mask_format,
                           flags.training,
                           flags.training ? ctx->saved_data["eps"].toDouble() : 0,
                           activation};
  // An absent tensor has no edge.
  size_t edge = 0;
  const auto is_wanted = [&](bool exists) { return exists && ctx->needs_input_grad(edge++); };
  std::array<bool, 4> wanted{};
  wanted[0] = is_wanted(true);
  wanted[1] = is_wanted(s.weight.defined());
  wanted[2] = is_wanted(flags.has_bias);
  wanted[3] = is_wanted(flags.has_residual);
  std::array<bool, 4> computed = wanted;
  if (!activation.name.has_value()) computed[3] = false;  // dresidual = dy
  if (computed != std::array<bool, 4>{}) {
    const bool is_differentiated = at::GradMode::is_enabled() || has_forward_gradient(dy);
    const bool has_kinks = at::GradMode::is_enabled() && parse(activation).kind == ActivationKind::kReluLike;
    const at::Tensor dy_of_inputs = has_kinks ? dy + zero_of_inputs(dy.options()) : dy;
    const auto [dx, dweight, dbias, dresidual] =
        is_differentiated ? composed_backward(dy_of_inputs, s, computed) : dispatch_backward(dy, s, computed);
    if (computed[0]) result[0] = dx;
    if (computed[1]) result[1] = dweight;
    if (computed[2]) result[2] = dbias;
    if (computed[3]) result[3] = dresidual;
  }
  if (wanted[3] && !computed[3]) result[3] = dy;
  return result;
}

// Returns y. The tensor for batch_norm_repeat goes to `saved_out`, because compiled autograd does not support outputs
// that are marked as not differentiable. Only tensors that may have gradients are separate arguments: the Function must
// find these, and each argument that it records costs time.
struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& /*input*/,
                            const OptionalTensor& /*weight*/,
                            const OptionalTensor& /*bias*/,
                            const OptionalTensor& /*residual*/,
                            const BatchNormArguments* args,
                            at::Tensor* saved_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const OptionalFormat mask_format = mask_format_of(*args);
    const auto [y, saved, mask] = dispatch_forward(*args, mask_format);
    save(ctx, *args, saved, mask, mask_format);
    *saved_out = saved;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_saved(ctx, grads[0], 6);
  }
};

// The inner operator of eval, for direct calls, as in an exported and decomposed model.
struct InferenceFunction : torch::autograd::Function<InferenceFunction> {
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& /*input*/,
                            const OptionalTensor& /*weight*/,
                            const OptionalTensor& /*bias*/,
                            const OptionalTensor& /*residual*/,
                            const BatchNormArguments* args,
                            OptionalFormat mask_format,
                            at::Tensor* saved_out,
                            at::Tensor* mask_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const OptionalFormat own = mask_format_of(*args), chosen = mask_format.has_value() ? mask_format : own;
    const auto [y, saved, mask] = dispatch_forward(*args, chosen);
    save(ctx, *args, saved, mask, own.has_value() ? chosen : own);
    *saved_out = saved;
    *mask_out = mask_format.has_value() ? mask : at::empty({0}, y.options().dtype(at::kByte));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_saved(ctx, grads[0], 8);
  }
};

}  // namespace

bool skips_this_pass(const Skip& skip) { return skip.recomputed && torch::autograd::get_current_graph_task_id() != -1; }

bool saves_u(const BatchNormArguments& args) {
  return args.activation.name.has_value() && !mask_format_of(args).has_value();
}

TensorAndSaved differentiable_batch_norm(const BatchNormArguments& a) {
  at::Tensor saved;
  const at::Tensor y = BatchNormFunction::apply(a.input, a.weight, a.bias, a.residual, &a, &saved);
  return {y, saved};
}

ThreeTensors differentiable_inference(const at::Tensor& input,
                                      const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const at::Tensor& running_mean,
                                      const at::Tensor& running_var,
                                      const OptionalTensor& residual,
                                      double eps,
                                      OptionalName activation,
                                      double activation_parameter,
                                      OptionalFormat mask_format) {
  const OptionalTensor mean(running_mean), var(running_var), no_count;
  const NamedActivation named{activation, activation_parameter};
  const BatchNormArguments args{input, mean, var, weight, bias, false, 0.0, eps, no_count, residual, named, {}};
  check_arguments(args);
  check_mask(args, mask_format);
  at::Tensor saved, mask;
  const at::Tensor y = InferenceFunction::apply(input, weight, bias, residual, &args, mask_format, &saved, &mask);
  return {y, saved, mask};
}

}  // namespace bn_ext
