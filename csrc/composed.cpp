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
  return has_forward_gradient(args.input) || has_forward_gradient(args.weight) || has_forward_gradient(args.bias);
}

at::Tensor composed_batch_norm(const BatchNormArguments& args) {
  const bool is_counted = args.training && args.num_batches_tracked.has_value() && args.num_batches_tracked->defined();
  // Counted first, as torch.nn does: where a transform forbids changes in place, nothing else has been changed then.
  if (is_counted) args.num_batches_tracked->add_(1);
  try {
    const bool is_cumulative = is_counted && !args.momentum.has_value();
    return at::batch_norm(args.input,
                          args.weight,
                          args.bias,
                          args.running_mean,
                          args.running_var,
                          args.training,
                          is_cumulative ? 1.0 / args.num_batches_tracked->item<double>() : args.momentum.value_or(0),
                          args.eps,
                          at::globalContext().userEnabledCuDNN());
  } catch (...) {
    if (is_counted) args.num_batches_tracked->sub_(1);
    throw;
  }
}

ThreeTensors composed_backward(const at::Tensor& dy,
                               const at::Tensor& input,
                               const OptionalTensor& weight,
                               const at::Tensor& mean,
                               const at::Tensor& rstd,
                               bool training,
                               double eps,
                               std::array<bool, 3> output_mask) {
  std::vector<int64_t> reduced{0};
  std::vector<c10::SymInt> broadcast(static_cast<size_t>(input.dim()), 1);
  broadcast[1] = input.sym_size(1);
  for (int64_t i = 2; i < input.dim(); ++i) reduced.push_back(i);

  const at::Tensor x = input.to(mean.scalar_type());
  const at::Tensor g = dy.to(mean.scalar_type());
  const at::Tensor mu = training ? x.mean(reduced, /*keepdim=*/true) : mean.view_symint(broadcast);
  const at::Tensor centred = x - mu;
  const at::Tensor r =
      training ? (centred.square().mean(reduced, /*keepdim=*/true) + eps).rsqrt() : rstd.view_symint(broadcast);
  const at::Tensor xhat = centred * r;

  at::Tensor dx;
  if (output_mask[0]) {
    at::Tensor scaled = training ? g - g.mean(reduced, true) - xhat * (g * xhat).mean(reduced, true) : g;
    scaled = scaled * r;
    if (weight.has_value() && weight->defined()) {
      scaled = scaled * weight->to(mean.scalar_type()).reshape_symint(broadcast);
    }
    dx = scaled.to(input.scalar_type());
  }
  const auto type = weight.has_value() && weight->defined() ? weight->scalar_type() : mean.scalar_type();
  const at::Tensor dweight = output_mask[1] ? (g * xhat).sum(reduced).to(type) : at::Tensor();
  const at::Tensor dbias = output_mask[2] ? g.sum(reduced).to(type) : at::Tensor();
  return {dx, dweight, dbias};
}

}  // namespace bn_ext
