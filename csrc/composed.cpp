// Batch normalisation composed from ATen's operators; see composed.h.
#include "composed.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/erfc.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <vector>

namespace bn_ext {

bool has_forward_gradient(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined();
}

bool needs_composed(const BatchNormArguments& args) {
  const auto device = args.input.device().type();
  if (device != at::kCPU && device != at::kCUDA && device != at::kMeta) return true;
  if (args.input.layout() != at::kStrided) return true;  // mkldnn works; sparse raises torch's error
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  return has_forward_gradient(args.input) || has_forward_gradient(args.weight) || has_forward_gradient(args.bias) ||
         has_forward_gradient(args.residual);
}

namespace {

at::Tensor blocked(const at::Tensor& u, const Activation& activation) {
  const at::Tensor low = u.le(0);
  return std::isnan(activation.upper) ? low : low.logical_or(u.ge(activation.upper));
}

at::Tensor relu_like_backward(const at::Tensor& g, const at::Tensor& is_blocked, const Activation& activation) {
  // Avoids inf * 0.
  const at::Tensor low = activation.alpha == 0 ? at::zeros_like(g) : g * activation.alpha;
  return at::where(is_blocked, low, g);
}

// Of the smooth activations.
at::Tensor derivative(const at::Tensor& u, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kElu:
      return at::where(u.gt(0), at::ones_like(u), u.clamp_max(0).exp() * activation.alpha);
    case ActivationKind::kSilu: {
      const at::Tensor s = u.sigmoid();
      return s * (u * (1 - s) + 1);
    }
    case ActivationKind::kGelu: {
      const at::Tensor cdf = at::erfc(u * -std::sqrt(0.5)) * 0.5;
      return cdf + u * at::exp(u.square() * -0.5) * 0.39894228040143267794;  // 1 / sqrt(2 pi)
    }
    case ActivationKind::kGeluTanh: {
      const double twice = 1.5957691216057307118;  // 2 sqrt(2 / pi)
      const at::Tensor s = at::sigmoid(u * (u.square() * 0.044715 + 1) * twice);
      return s + u * s * (1 - s) * ((u.square() * (3 * 0.044715) + 1) * twice);
    }
    case ActivationKind::kHardswish: {
      const at::Tensor low = at::where(u.le(-3), at::zeros_like(u), u / 3 + 0.5);
      return at::where(u.ge(3), at::ones_like(u), low);
    }
    case ActivationKind::kSigmoid: {
      const at::Tensor s = u.sigmoid();
      return s * (1 - s);
    }
    case ActivationKind::kTanh:
      return 1 - u.tanh().square();
    case ActivationKind::kMish: {
      const at::Tensor t = at::softplus(u).tanh();
      return t + u * (1 - t.square()) * u.sigmoid();
    }
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
}

// g * activation'(u)
at::Tensor composed_activation_backward(const at::Tensor& g, const at::Tensor& u, const Activation& activation) {
  if (activation.kind == ActivationKind::kNone) return g;
  if (activation.kind == ActivationKind::kReluLike) return relu_like_backward(g, blocked(u, activation), activation);
  return g * derivative(u, activation);
}

// The same for kReluLike, from the mask of a forward pass. Its y had g's sizes and this memory format.
at::Tensor composed_mask_backward(const at::Tensor& g,
                                  const at::Tensor& mask,
                                  at::MemoryFormat format,
                                  const Activation& activation) {
  const at::Tensor bits = at::arange(8, mask.options()).unsqueeze(0);
  const at::Tensor is_blocked = mask.unsqueeze(1).bitwise_right_shift(bits).bitwise_and(1).eq(0).flatten();
  const at::Tensor in_memory_order = is_blocked.narrow_symint(0, 0, g.sym_numel());
  if (format == at::MemoryFormat::Contiguous) {
    return relu_like_backward(g, in_memory_order.view_symint(g.sym_sizes()), activation);
  }
  std::vector<c10::SymInt> sizes = g.sym_sizes().vec();  // (N, C, ...) to (N, ..., C)
  sizes.push_back(sizes[1]);
  sizes.erase(sizes.begin() + 1);
  return relu_like_backward(g, in_memory_order.view_symint(sizes).movedim(-1, 1), activation);
}

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

// ATen updates copies, because it may save them for backward. Only their finite channels are copied back.
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

at::Tensor composed_activation(const at::Tensor& u, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kNone:
      return u;
    case ActivationKind::kReluLike:
      if (!std::isnan(activation.upper)) return at::hardtanh(u, 0, activation.upper);
      return activation.alpha == 0 ? at::relu(u) : at::leaky_relu(u, activation.alpha);
    case ActivationKind::kElu:
      return at::elu(u, activation.alpha);
    case ActivationKind::kSilu:
      return at::silu(u);
    case ActivationKind::kGelu:
      return at::gelu(u);
    case ActivationKind::kGeluTanh:
      return at::gelu(u, "tanh");
    case ActivationKind::kHardswish:
      return at::hardswish(u);
    case ActivationKind::kSigmoid:
      return at::sigmoid(u);
    case ActivationKind::kTanh:
      return at::tanh(u);
    case ActivationKind::kMish:
      return at::mish(u);
  }
  return u;
}

at::Tensor composed_batch_norm(const BatchNormArguments& given) {
  const BatchNormArguments args = given.training && skips_this_pass(given.skip) ? without_updates(given) : given;
  const bool is_counted = args.training && is_defined(args.num_batches_tracked);
  // Throws if a transform forbids in-place changes, before anything has changed.
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
