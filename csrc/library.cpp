// Registers the operators: their schemas, and the function for each dispatch key.
#include <torch/library.h>

#include "autograd.h"
#include "batch_norm.h"
#include "operator.h"

namespace {

// flexible_layout: Inductor makes the inputs of convolutions channels_last, whatever the model's memory format. By
// default it calls operators with the strides that were traced, which would take a copy before and after each batch
// norm, forward and backward. The price of the tag: on a GPU, large contiguous tensors may have padded strides, and
// then the operators make the copy.
const std::vector<at::Tag> kTags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};

}  // namespace

TORCH_LIBRARY(bn_ext, m) {
  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None, "
      "Tensor? bias=None, bool training=False, float? momentum=0.1, float eps=1e-05, *, "
      "Tensor(c!)? num_batches_tracked=None, Tensor? residual=None, str? activation=None, "
      "float activation_parameter=0.0, bool skip_nonfinite=False, bool skip_recomputed=False) -> Tensor",
      kTags);
  m.def("activate(Tensor input, str activation, float activation_parameter) -> Tensor");
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, "
      "str? activation=None, float activation_parameter=0.0, MemoryFormat? mask_format=None, "
      "bool skip_nonfinite=False, bool skip_recomputed=False) -> (Tensor y, Tensor saved, Tensor mask)",
      kTags);
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, str? activation=None, float activation_parameter=0.0, "
      "MemoryFormat? mask_format=None) -> (Tensor y, Tensor saved, Tensor mask)",
      kTags);
  m.def(
      "batch_norm_repeat(Tensor input, Tensor saved, Tensor? residual, str? activation=None, "
      "float activation_parameter=0.0) -> Tensor",
      kTags);
  m.def(
      "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor saved, Tensor? residual, Tensor? mask, "
      "MemoryFormat? mask_format, bool training, str? activation, float activation_parameter, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      kTags);
}

namespace bn_ext {

TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", &batch_norm);
  m.impl("activate", &activate);
}

// By default vmap and functionalize do not decompose operators that write to their arguments.
TORCH_LIBRARY_IMPL(bn_ext, FuncTorchBatchedDecomposition, m) { m.impl("batch_norm", &batch_norm); }
TORCH_LIBRARY_IMPL(bn_ext, Functionalize, m) { m.impl("batch_norm", &batch_norm); }

TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) { m.impl("batch_norm_inference", &differentiable_inference); }

// The same host code serves both devices; run_forward and run_backward choose the back-end.
TORCH_LIBRARY_IMPL(bn_ext, CPU, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_repeat", &batch_norm_repeat);
  m.impl("batch_norm_backward", &batch_norm_backward<true>);
}

TORCH_LIBRARY_IMPL(bn_ext, CUDA, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_repeat", &batch_norm_repeat);
  m.impl("batch_norm_backward", &batch_norm_backward<true>);
}

}  // namespace bn_ext
