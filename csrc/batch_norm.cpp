// Turns tensors into plain memory: memory formats, outputs, choice of back-end.
#include "batch_norm.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "activation.h"
#include "arguments.h"
#include "checks.h"
#include "cpu/batch_norm_cpu.h"
#include "cuda/batch_norm_cuda.h"
#include "params.h"

namespace bn_ext {
namespace {

at::ScalarType accumulate_type_of(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Returns the shape of a tensor that is contiguous in `format`.
Shape shape_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t n = x.size(0);
  const int64_t c = x.size(1);
  int64_t s = 1;
  for (int64_t i = 2; i < x.dim(); ++i) s *= x.size(i);
  return {n, c, s, s == 1 || format != at::MemoryFormat::Contiguous};
}

bool is_expanded_scalar(const at::Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) != 1 && t.stride(i) != 0) return false;
  }
  return true;
}

// at::empty goes through the dispatcher, which is slow for small tensors. On the CPU only modes need that.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const bool is_known = options.device().is_cpu() && c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  return is_known ? at::Tensor(at::detail::empty_cpu(sizes, options)) : at::empty(sizes, options);
}

// A (C,) vector in contiguous memory for the kernels. It owns the copy, if one is needed.
class ChannelVector {
 public:
  explicit ChannelVector(const OptionalTensor& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return;
    original_ = *tensor;
    contiguous_ = original_.contiguous();
  }
  bool defined() const { return contiguous_.defined(); }
  at::ScalarType scalar_type() const { return contiguous_.scalar_type(); }
  const void* data() const { return defined() ? contiguous_.const_data_ptr() : nullptr; }
  void* mutable_data() const { return defined() ? contiguous_.mutable_data_ptr() : nullptr; }
  // Call this after the kernels have written to mutable_data().
  void write_back() const {
    if (defined() && !contiguous_.is_same(original_)) original_.copy_(contiguous_);
  }

 private:
  at::Tensor original_;
  at::Tensor contiguous_;
};

at::ScalarType params_type_of(const at::Tensor& input, std::initializer_list<const ChannelVector*> vectors) {
  for (const ChannelVector* vector : vectors) {
    if (vector->defined()) return vector->scalar_type();
  }
  return accumulate_type_of(input.scalar_type());
}

void run_forward(const at::Tensor& x, const ForwardParams& params) {
  x.is_cuda() ? cuda::forward(params, x.get_device()) : cpu::forward(params);
}

void run_backward(const at::Tensor& x, const BackwardParams& params) {
  x.is_cuda() ? cuda::backward(params, x.get_device()) : cpu::backward(params);
}

// The kernels can increment an int64 on their own device. Torch increments any other count.
bool kernels_can_count(const at::Tensor& count, const at::Tensor& x) {
  return count.scalar_type() == at::kLong && count.numel() == 1 && count.device() == x.device();
}

// Saved statistics, (4, C) in the accumulate type; see batch_norm.h.
struct Saved {
  at::Tensor tensor;

  void* row(int64_t i) const {
    return static_cast<char*>(tensor.data_ptr()) + i * tensor.size(1) * int64_t(tensor.element_size());
  }
};

// Sets the shape, the types, and the tensors that every forward pass reads and writes.
ForwardParams forward_params(const at::Tensor& x,
                             at::MemoryFormat format,
                             const at::Tensor& z,
                             const Activation& activation,
                             const at::Tensor& y,
                             const Saved& saved) {
  ForwardParams p{};
  p.shape = shape_of(x, format);
  p.dtype = dtype_of(x.scalar_type());
  p.activation = activation;
  p.x = x.const_data_ptr();
  p.z = z.defined() ? z.const_data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.mean = saved.row(0);
  p.rstd = saved.row(1);
  p.scale = saved.row(2);
  p.offset = saved.row(3);
  return p;
}

at::Tensor contiguous_or_none(const OptionalTensor& tensor, at::MemoryFormat format) {
  return tensor.has_value() && tensor->defined() ? tensor->contiguous(format) : at::Tensor();
}

// The forward pass of both modes, for checked arguments. If no mask is requested, the returned mask is empty if
// kAllDefined, as operators must return it, otherwise undefined, which saves an allocation. All steps that can fail
// come before the back-end writes anything.
template <bool kAllDefined>
ThreeTensors forward(const BatchNormArguments& a, OptionalFormat mask_format) {
  const c10::DeviceGuard guard(a.input.device());  // kernels run on the current device
  const bool saves_mask = mask_format.has_value();
  const at::MemoryFormat format = mask_format.value_or(memory_format_of(a.input));
  const at::Tensor x = a.input.contiguous(format);
  const at::Tensor z = contiguous_or_none(a.residual, format);
  const ChannelVector weight(a.weight), bias(a.bias), running_mean(a.running_mean), running_var(a.running_var);
  const at::Tensor y = empty(x.sizes(), x.options().memory_format(format));
  const Saved saved{empty({4, x.size(1)}, x.options().dtype(accumulate_type_of(x.scalar_type())))};
  at::Tensor mask;
  if (saves_mask || kAllDefined) {
    mask = empty({saves_mask ? mask_bytes(x.numel()) : 0}, x.options().dtype(at::kByte));
  }

  const bool is_tracked = a.num_batches_tracked.has_value() && a.num_batches_tracked->defined();
  const bool counted_by_torch =
      a.training && is_tracked && (x.numel() == 0 || !kernels_can_count(*a.num_batches_tracked, x));
  std::optional<double> momentum = a.momentum;
  if (a.training && is_tracked && !momentum.has_value() && (counted_by_torch || a.num_batches_tracked->is_cpu())) {
    const double cumulative = cumulative_momentum(*a.num_batches_tracked);  // may throw; kernels read a count on a GPU
    if (counted_by_torch) momentum = cumulative;
  }
  if (x.numel() == 0) {
    if (counted_by_torch) a.num_batches_tracked->add_(1);
    return {y, saved.tensor.zero_(), saves_mask ? mask.zero_() : mask};
  }
  const at::Tensor raised_count = counted_by_torch ? a.num_batches_tracked->clone().add_(1) : at::Tensor();

  ForwardParams p = forward_params(x, format, z, parse(a.activation), y, saved);
  p.params_dtype = dtype_of(params_type_of(x, {&weight, &bias, &running_mean}));
  p.training = a.training;
  p.weight = weight.data();
  p.bias = bias.data();
  // Requesting a mutable pointer would end the sharing of memory with lazy copies.
  const auto updated = [&](const ChannelVector& vector) {
    return a.training ? vector.mutable_data() : const_cast<void*>(vector.data());
  };
  p.running_mean = updated(running_mean);
  p.running_var = updated(running_var);
  if (a.training && is_tracked && !counted_by_torch) p.num_batches_tracked = a.num_batches_tracked->data_ptr<int64_t>();
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0);
  p.skip_nonfinite = a.skip.nonfinite;
  p.eps = a.eps;
  p.mask = saves_mask ? mask.data_ptr<uint8_t>() : nullptr;
  run_forward(x, p);
  if (counted_by_torch) a.num_batches_tracked->copy_(raised_count);
  if (a.training) {
    running_mean.write_back();
    running_var.write_back();
  }
  return {y, saved.tensor, mask};
}

template <bool kAllDefined>
ThreeTensors forward_or_skip(const BatchNormArguments& args, OptionalFormat mask_format) {
  return forward<kAllDefined>(args.training && skips_this_pass(args.skip) ? without_updates(args) : args, mask_format);
}

}  // namespace

ThreeTensors batch_norm_of_checked(const BatchNormArguments& args, OptionalFormat mask_format) {
  return forward_or_skip<false>(args, mask_format);
}

ThreeTensors batch_norm_forward(const at::Tensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                const OptionalTensor& residual,
                                std::optional<double> momentum,
                                double eps,
                                OptionalName activation,
                                double activation_parameter,
                                OptionalFormat mask_format,
                                bool skip_nonfinite,
                                bool skip_recomputed) {
  const Skip skip{skip_nonfinite, skip_recomputed};
  const BatchNormArguments args{input,
                                running_mean,
                                running_var,
                                weight,
                                bias,
                                true,
                                momentum,
                                eps,
                                num_batches_tracked,
                                residual,
                                {activation, activation_parameter},
                                skip};
  check_arguments(args);
  check_mask(args, mask_format);
  return forward_or_skip<true>(args, mask_format);
}

ThreeTensors batch_norm_inference(const at::Tensor& input,
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
  const BatchNormArguments args{
      input, mean, var, weight, bias, false, 0.0, eps, no_count, residual, {activation, activation_parameter}, {}};
  check_arguments(args);
  check_mask(args, mask_format);
  return forward_or_skip<true>(args, mask_format);
}

at::Tensor batch_norm_repeat(const at::Tensor& input,
                             const at::Tensor& saved,
                             const OptionalTensor& residual,
                             OptionalName activation,
                             double activation_parameter) {
  check_saved(input, saved);
  check_residual(input, residual);
  const c10::DeviceGuard guard(input.device());
  const at::MemoryFormat format = memory_format_of(input);
  const at::Tensor x = input.contiguous(format);
  const at::Tensor z = contiguous_or_none(residual, format);
  const at::Tensor y = empty(x.sizes(), x.options().memory_format(format));
  if (x.numel() == 0) return y;
  const Saved s{saved.contiguous()};  // keeps the copy until the kernels have read it
  ForwardParams p = forward_params(x, format, z, parse({activation, activation_parameter}), y, s);
  p.recompute = true;
  run_forward(x, p);
  return y;
}

template <bool kAllDefined>
FourTensors batch_norm_backward(const at::Tensor& dy,
                                const at::Tensor& input,
                                const OptionalTensor& weight,
                                const at::Tensor& saved,
                                const OptionalTensor& residual,
                                const OptionalTensor& mask,
                                OptionalFormat mask_format,
                                bool training,
                                OptionalName activation_name,
                                double activation_parameter,
                                std::array<bool, 4> output_mask) {
  const Activation activation = parse({activation_name, activation_parameter});
  check_backward(dy, input, weight, saved, residual, mask, mask_format);
  const bool has_mask = is_defined(mask);
  TORCH_CHECK(!has_mask || activation.kind == ActivationKind::kNone || activation.kind == ActivationKind::kReluLike,
              "mask requires the activation relu, leaky_relu or relu6, got ",
              activation_name.value_or("None"));
  const c10::DeviceGuard guard(input.device());
  const at::MemoryFormat format = has_mask ? *mask_format : memory_format_of(input);
  const at::Tensor x = input.contiguous(format);
  const Saved s{saved.contiguous()};
  const ChannelVector w(weight);
  const auto options = x.options().dtype(w.defined() ? w.scalar_type() : saved.scalar_type());
  const auto none = [](const at::TensorOptions& options) { return kAllDefined ? empty({0}, options) : at::Tensor(); };
  const auto vector = [&](bool wanted) { return wanted ? empty({x.size(1)}, options) : none(options); };
  const auto like_x = [&](bool wanted) {
    return wanted ? empty(x.sizes(), x.options().memory_format(format)) : none(x.options());
  };
  const at::Tensor dx = like_x(output_mask[0]);
  const at::Tensor dweight = vector(output_mask[1]);
  const at::Tensor dbias = vector(output_mask[2]);
  const at::Tensor dz = like_x(output_mask[3]);
  if (x.numel() == 0) {
    for (const at::Tensor& gradient : {dweight, dbias}) {
      if (gradient.defined()) gradient.zero_();
    }
    return {dx, dweight, dbias, dz};
  }

  const bool is_none = activation.kind == ActivationKind::kNone;
  if (is_none && output_mask[3]) dz.copy_(dy);
  const bool is_scalar = is_expanded_scalar(dy);
  const at::Tensor g = is_scalar ? dy : dy.contiguous(format);
  const at::Tensor z = is_none || has_mask ? at::Tensor() : contiguous_or_none(residual, format);
  BackwardParams p{};
  p.shape = shape_of(x, format);
  p.dtype = dtype_of(x.scalar_type());
  p.params_dtype = dtype_of(options.dtype().toScalarType());
  p.training = training;
  p.activation = activation;
  p.dy = g.const_data_ptr();
  p.dy_is_scalar = is_scalar;
  p.x = x.const_data_ptr();
  p.z = z.defined() ? z.const_data_ptr() : nullptr;
  p.mask = has_mask && !is_none ? mask->const_data_ptr<uint8_t>() : nullptr;
  p.mean = s.row(0);
  p.rstd = s.row(1);
  p.scale = s.row(2);
  p.offset = s.row(3);
  p.dx = output_mask[0] ? dx.data_ptr() : nullptr;
  p.dz = output_mask[3] && !is_none ? dz.data_ptr() : nullptr;
  p.dweight = output_mask[1] ? dweight.data_ptr() : nullptr;
  p.dbias = output_mask[2] ? dbias.data_ptr() : nullptr;
  run_backward(x, p);
  return {dx, dweight, dbias, dz};
}

template decltype(batch_norm_backward<true>) batch_norm_backward<true>;
template decltype(batch_norm_backward<false>) batch_norm_backward<false>;

}  // namespace bn_ext
