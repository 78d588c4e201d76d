// Calls operators through the dispatcher, so that compilers, fake tensors and other modes see them.
#include "dispatch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "autograd.h"
#include "operator.h"

namespace bn_ext {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether the dispatcher would only run the kernels, because no mode, subclass, lazy bit or profiler is involved. Then
// they are called directly, because dispatch takes as long as the kernels for a small tensor.
template <typename... Tensors>
bool goes_to_kernels(const Tensors&... tensors) {
  static const c10::DispatchKeySet minded = c10::DispatchKeySet(c10::DispatchKeySet::FULL) -
                                            c10::autocast_dispatch_keyset -
                                            c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  const c10::DispatchKeySet all = c10::detail::multi_dispatch_key_set(tensors...);
  const auto key = c10::impl::computeDispatchKeySet(all, minded).highestPriorityTypeId();
  return (key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA) &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

}  // namespace

FourTensors dispatch_backward(const at::Tensor& dy, const SavedForBackward& s, std::array<bool, 4> output_mask) {
  at::AutoDispatchBelowADInplaceOrView guard;  // keeps torch's boxed fallback from searching for gradients
  const auto call = [&](const auto& function) {
    return function(dy,
                    s.input,
                    optional(s.weight),
                    s.saved,
                    optional(s.residual),
                    optional(s.mask),
                    s.mask_format,
                    s.training,
                    s.activation.name,
                    s.activation.parameter,
                    output_mask);
  };
  if (goes_to_kernels(dy, s.input, s.weight, s.saved, s.residual, s.mask))
    return call(batch_norm_backward</*kAllDefined=*/false>);
  static const auto op = operator_handle<decltype(batch_norm_backward<true>)>("bn_ext::batch_norm_backward");
  return call([](const auto&... arguments) { return op.call(arguments...); });
}

ThreeTensors dispatch_forward(const BatchNormArguments& a, OptionalFormat mask_format) {
  if (goes_to_kernels(a.input, a.weight, a.bias, a.running_mean, a.running_var, a.num_batches_tracked, a.residual)) {
    return batch_norm_of_checked(a, mask_format);
  }
  const auto& [name, parameter] = a.activation;
  if (a.training) {
    static const auto op = operator_handle<decltype(batch_norm_forward)>("bn_ext::batch_norm_forward");
    return op.call(a.input,
                   a.weight,
                   a.bias,
                   a.running_mean,
                   a.running_var,
                   a.num_batches_tracked,
                   a.residual,
                   a.momentum,
                   a.eps,
                   name,
                   parameter,
                   mask_format,
                   a.skip.nonfinite,
                   a.skip.recomputed);
  }
  static const auto op = operator_handle<decltype(batch_norm_inference)>("bn_ext::batch_norm_inference");
  return op.call(
      a.input, a.weight, a.bias, *a.running_mean, *a.running_var, a.residual, a.eps, name, parameter, mask_format);
}

at::Tensor dispatch_batch_norm(const BatchNormArguments& a) {
  static const auto op = operator_handle<decltype(batch_norm)>("bn_ext::batch_norm");
  return op.call(a.input,
                 a.running_mean,
                 a.running_var,
                 a.weight,
                 a.bias,
                 a.training,
                 a.momentum,
                 a.eps,
                 a.num_batches_tracked,
                 a.residual,
                 a.activation.name,
                 a.activation.parameter,
                 a.skip.nonfinite,
                 a.skip.recomputed);
}

}  // namespace bn_ext
