// Batch normalisation composed from ATen's operators; see composed.h.
#include "composed.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace bn_ext {

bool has_forward_gradient(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined();
}

bool needs_composed(const BatchNormArguments& args) {
  const auto device = args.input.device().type();
  if (device != at::kCPU && device != at::kCUDA && device != at::kMeta) return true;
  if (args.input.layout() != at::kStrided) return true;  // mkldnn; sparse gets torch's error
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  return has_forward_gradient(args.input) || has_forward_gradient(args.weight) || has_forward_gradient(args.bias) ||
         has_forward_gradient(args.residual);
}

namespace {

at::Tensor aten_batch_norm(const BatchNormArguments& args, double momentum) {
  return at::batch_norm(args.input,
                        args.weight,
                        args.bias,
                        args.running_mean,
                        args.running_var,
                        args.training,
                        momentum,
                        args.eps,
                        at::globalContext().userEnabledCuDNN());
}

// ATen updates copies, which it may save for backward; of these the finite channels are taken.
at::Tensor aten_batch_norm_skipping_nonfinite(const BatchNormArguments& args, double momentum) {
  at::Tensor mean = *args.running_mean, var = *args.running_var;
  const OptionalTensor new_mean = mean.clone(), new_var = var.clone();
  const at::Tensor y = aten_batch_norm(with_statistics(args, new_mean, new_var), momentum);
  const at::Tensor is_finite = new_mean->isfinite().logical_and(new_var->isfinite());
  mean.copy_(at::where(is_finite, *new_mean, mean));
  var.copy_(at::where(is_finite, *new_var, var));
  return y;
}

}  // namespace

at::Tensor composed_batch_norm(const BatchNormArguments& given) {
  const BatchNormArguments args = given.training && skips_this_pass(given.skip) ? without_updates(given) : given;
  const bool is_counted = args.training && is_defined(args.num_batches_tracked);
  // Says so where a transform forbids changes in place, before anything has changed.
  if (is_counted) args.num_batches_tracked->add_(0);
  const bool is_cumulative = is_counted && !args.momentum.has_value();
  const double momentum = is_cumulative ? cumulative_momentum(*args.num_batches_tracked) : args.momentum.value_or(0);
  const bool skips = args.training && args.skip.nonfinite && is_defined(args.running_mean);
  const at::Tensor y = skips ? aten_batch_norm_skipping_nonfinite(args, momentum) : aten_batch_norm(args, momentum);
  if (is_counted) args.num_batches_tracked->add_(1);
  return composed_activation(is_defined(args.residual) ? y + *args.residual : y, parse(args.activation));
}

FourTensors composed_backward(const at::Tensor& dy, const SavedForBackward& s, std::array<bool, 4> output_mask) {
  const at::Tensor& input = s.input;
  const at::ScalarType type = s.saved.scalar_type();
  std::vector<int64_t> reduced{0};
  std::vector<c10::SymInt> broadcast(static_cast<size_t>(input.dim()), 1);
  broadcast[1] = input.sym_size(1);
  for (int64_t i = 2; i < input.dim(); ++i) reduced.push_back(i);
  const auto per_channel = [&](const at::Tensor& t) { return t.to(type).reshape_symint(broadcast); };

  const at::Tensor x = input.to(type);
  const at::Tensor mu = s.training ? x.mean(reduced, /*keepdim=*/true) : per_channel(s.saved[0]);
  const at::Tensor centred = x - mu;
  const at::Tensor r =
      s.training ? (centred.square().mean(reduced, /*keepdim=*/true) + s.eps).rsqrt() : per_channel(s.saved[1]);
  const at::Tensor xhat = centred * r;

  const Activation activation = parse(s.activation);
  at::Tensor g = dy.to(type);
  if (s.mask.defined()) {
    g = composed_mask_backward(g, s.mask, *s.mask_format, activation);
  } else if (activation.kind != ActivationKind::kNone) {
    at::Tensor u = s.weight.defined() ? xhat * per_channel(s.weight) : xhat;
    if (s.bias.defined()) u = u + per_channel(s.bias);
    if (s.residual.defined()) u = u + s.residual.to(type);
    g = composed_activation_backward(g, u, activation);
  }

  at::Tensor dx;
  if (output_mask[0]) {
    at::Tensor scaled = s.training ? g - g.mean(reduced, true) - xhat * (g * xhat).mean(reduced, true) : g;
    scaled = scaled * r;
    if (s.weight.defined()) scaled = scaled * per_channel(s.weight);
    dx = scaled.to(input.scalar_type());
  }
  const auto params_type = s.weight.defined() ? s.weight.scalar_type() : type;
  const at::Tensor dweight = output_mask[1] ? (g * xhat).sum(reduced).to(params_type) : at::Tensor();
  const at::Tensor dbias = output_mask[2] ? g.sum(reduced).to(params_type) : at::Tensor();
  return {dx, dweight, dbias, output_mask[3] ? g.to(input.scalar_type()) : at::Tensor()};
}

}  // namespace bn_ext
