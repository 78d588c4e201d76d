// From tensors to plain memory: memory formats, outputs, choice of back-end.
#include "batch_norm.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/batch_norm_cpu.h"
#include "cuda/batch_norm_cuda.h"
#include "params.h"

namespace bn_ext {
namespace {

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", type, "'");
  }
}

at::ScalarType accumulate_type_of(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Shape of a tensor that is contiguous in `format`.
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

// A (C,) vector as the kernels read it. Contiguous copies live as long as this.
class ChannelVector {
 public:
  explicit ChannelVector(const OptionalTensor& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return;
    original_ = *tensor;
    contiguous_ = original_.contiguous();
  }
  bool defined() const { return contiguous_.defined(); }
  at::ScalarType scalar_type() const { return contiguous_.scalar_type(); }
  void* data() const { return defined() ? contiguous_.data_ptr() : nullptr; }
  // After the kernels wrote to data().
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
  x.is_cuda() ? cuda::forward(params) : cpu::forward(params);
}

void run_backward(const at::Tensor& x, const BackwardParams& params) {
  x.is_cuda() ? cuda::backward(params) : cpu::backward(params);
}

// The kernels count in an int64 on their own device; a count of another kind is raised by torch.
bool kernels_can_count(const at::Tensor& count, const at::Tensor& x) {
  return count.scalar_type() == at::kLong && count.numel() == 1 && count.device() == x.device();
}

// Both forward passes. What can fail for a bad argument comes before the back-end writes anything.
ThreeTensors forward(const at::Tensor& input,
                     const ChannelVector& weight,
                     const ChannelVector& bias,
                     const ChannelVector& running_mean,
                     const ChannelVector& running_var,
                     const OptionalTensor& num_batches_tracked,
                     bool training,
                     std::optional<double> momentum,
                     double eps) {
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = input.contiguous(format);
  const at::Tensor y = at::empty(x.sizes(), x.options().memory_format(format));
  const auto options = x.options().dtype(accumulate_type_of(x.scalar_type()));
  const at::Tensor mean = at::empty({x.size(1)}, options);
  const at::Tensor rstd = at::empty({x.size(1)}, options);
  const bool is_tracked = num_batches_tracked.has_value() && num_batches_tracked->defined();
  const bool counted_by_torch =
      training && is_tracked && (x.numel() == 0 || !kernels_can_count(*num_batches_tracked, x));
  if (counted_by_torch && !momentum.has_value()) momentum = 1.0 / (num_batches_tracked->item<double>() + 1);
  if (counted_by_torch) num_batches_tracked->add_(1);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.zero_()};
  ForwardParams p{};
  p.shape = shape_of(x, format);
  p.dtype = dtype_of(x.scalar_type());
  p.params_dtype = dtype_of(params_type_of(x, {&weight, &bias, &running_mean}));
  p.training = training;
  p.x = x.const_data_ptr();
  p.weight = weight.data();
  p.bias = bias.data();
  p.running_mean = running_mean.data();
  p.running_var = running_var.data();
  p.num_batches_tracked = is_tracked && !counted_by_torch ? num_batches_tracked->data_ptr<int64_t>() : nullptr;
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0);
  p.eps = eps;
  p.y = y.data_ptr();
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  run_forward(x, p);
  return {y, mean, rstd};
}

}  // namespace

ThreeTensors batch_norm_forward(const at::Tensor& input,
                                const OptionalTensor& weight,
                                const OptionalTensor& bias,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                std::optional<double> momentum,
                                double eps) {
  check_arguments({input, running_mean, running_var, weight, bias, true, momentum, eps, num_batches_tracked});
  const c10::DeviceGuard guard(input.device());  // kernels are launched on the current device
  const ChannelVector mean(running_mean);
  const ChannelVector var(running_var);
  const ThreeTensors result =
      forward(input, ChannelVector(weight), ChannelVector(bias), mean, var, num_batches_tracked, true, momentum, eps);
  mean.write_back();
  var.write_back();
  return result;
}

ThreeTensors batch_norm_inference(const at::Tensor& input,
                                  const OptionalTensor& weight,
                                  const OptionalTensor& bias,
                                  const at::Tensor& running_mean,
                                  const at::Tensor& running_var,
                                  double eps) {
  check_arguments({input, running_mean, running_var, weight, bias, false, 0.0, eps, std::nullopt});
  const c10::DeviceGuard guard(input.device());
  return forward(input,
                 ChannelVector(weight),
                 ChannelVector(bias),
                 ChannelVector(running_mean),
                 ChannelVector(running_var),
                 std::nullopt,
                 false,
                 0.0,
                 eps);
}

ThreeTensors batch_norm_backward(const at::Tensor& dy,
                                 const at::Tensor& input,
                                 const OptionalTensor& weight,
                                 const at::Tensor& mean,
                                 const at::Tensor& rstd,
                                 bool training,
                                 std::array<bool, 3> output_mask) {
  check_backward(dy, input, weight, mean, rstd);
  const c10::DeviceGuard guard(input.device());
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = input.contiguous(format);
  const at::Tensor saved_mean = mean.contiguous();
  const at::Tensor saved_rstd = rstd.contiguous();
  const ChannelVector w(weight);
  const auto options = x.options().dtype(w.defined() ? w.scalar_type() : mean.scalar_type());
  const auto vector = [&](bool wanted) { return at::empty({wanted ? x.size(1) : 0}, options); };
  const at::Tensor dx =
      output_mask[0] ? at::empty(x.sizes(), x.options().memory_format(format)) : at::empty({0}, x.options());
  const at::Tensor dweight = vector(output_mask[1]);
  const at::Tensor dbias = vector(output_mask[2]);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_()};

  const bool is_scalar = is_expanded_scalar(dy);
  const at::Tensor g = is_scalar ? dy : dy.contiguous(format);
  BackwardParams p{};
  p.shape = shape_of(x, format);
  p.dtype = dtype_of(x.scalar_type());
  p.params_dtype = dtype_of(dweight.scalar_type());
  p.training = training;
  p.dy = g.const_data_ptr();
  p.dy_is_scalar = is_scalar;
  p.x = x.const_data_ptr();
  p.weight = w.data();
  p.mean = saved_mean.const_data_ptr();
  p.rstd = saved_rstd.const_data_ptr();
  p.dx = output_mask[0] ? dx.data_ptr() : nullptr;
  p.dweight = output_mask[1] ? dweight.data_ptr() : nullptr;
  p.dbias = output_mask[2] ? dbias.data_ptr() : nullptr;
  run_backward(x, p);
  return {dx, dweight, dbias};
}

// The same host code serves both devices; run_forward and run_backward choose the back-end.
TORCH_LIBRARY_IMPL(bn_ext, CPU, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

TORCH_LIBRARY_IMPL(bn_ext, CUDA, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

}  // namespace bn_ext
