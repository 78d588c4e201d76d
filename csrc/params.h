// The whole contract between batch_norm.cpp (tensors) and a back-end (plain memory): no torch header here.
#pragma once

#include <cstdint>

namespace bn_ext {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// An activation tensor: N images, C channels, S positions (product of the spatial sizes; 1 for (N, C) input).
struct Shape {
  int64_t n;
  int64_t c;
  int64_t s;
  bool channels_last;  // false: (N, C, S) contiguous; true: (N, S, C) contiguous

  constexpr int64_t values_per_channel() const { return n * s; }
  constexpr int64_t numel() const { return n * c * s; }
};

// What is applied to a normalised value, the residual added. kNone leaves it as it is.
enum class ActivationKind : int {
  kNone,
  kReluLike,  // relu, leaky_relu, relu6: see `slope` and `upper` in activation.inl
  kElu,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
  kSigmoid,
  kTanh,
  kMish,
};

struct Activation {
  ActivationKind kind;
  double alpha;  // kReluLike: slope where a value does not pass; kElu: its alpha
  double upper;  // kReluLike: values that great do not pass either; NaN: none is too great
};

// A mask has one bit per value, in the order in which they lie in memory: bit i % 8 of byte i / 8, one where the value
// passed. The bytes are as many as this, so that any bit may be read with the three bytes behind it.
constexpr int64_t mask_bytes(int64_t numel) { return numel / 8 + 4; }

// Whether a value of `dtype` can be this: not NaN, inf, or what is too large.
constexpr bool can_hold(DType dtype, double value) {
  const double largest = dtype == DType::kFloat16    ? 65504
                         : dtype == DType::kBFloat16 ? 0x1.FEp+127
                         : dtype == DType::kFloat32  ? 0x1.FFFFFEp+127
                                                     : 0x1.FFFFFFFFFFFFFp+1023;
  return -largest <= value && value <= largest;
}

// u = (x - mean) * scale + offset, y = activation(u + z); scale = rstd * weight, and offset is bias, corrected for the
// rounding of mean. Per-channel vectors are (C,), contiguous. "params" are weight, bias, running_mean and running_var.
// "saved" are mean, rstd, scale and offset, float64 for float64 activations, else float32. dweight and dbias have the
// params dtype.
struct ForwardParams {
  Shape shape;
  DType dtype;         // of x, y and z
  DType params_dtype;  // of params
  bool training;       // statistics of the batch; false: running statistics
  bool recompute;      // y again, from saved, which are read; params are not used
  Activation activation;
  const void* x;                 // activation tensor
  const void* z;                 // residual, activation tensor; null: none
  const void* weight;            // params dtype; null: 1
  const void* bias;              // params dtype; null: 0
  void* running_mean;            // params dtype; null: not tracked. Written only in training
  void* running_var;             // params dtype; null exactly where running_mean is
  int64_t* num_batches_tracked;  // one value, raised by one in training; null: not tracked
  bool cumulative;               // running statistics are the mean over all batches (momentum=None)
  double momentum;               // weight of this batch in the running statistics; unused if cumulative
  bool skip_nonfinite;           // a channel keeps running statistics that would become inf or NaN
  double eps;
  void* y;        // activation tensor
  void* mean;     // saved
  void* rstd;     // saved, 1 / sqrt(var + eps)
  void* scale;    // saved
  void* offset;   // saved
  uint8_t* mask;  // mask_bytes(numel), kReluLike; null: not wanted
};

// g = dy * activation'(u + z), which takes the place of dy in the formulas; dz = g.
struct BackwardParams {
  Shape shape;
  DType dtype;         // of dy, x, z, dx and dz
  DType params_dtype;  // of dweight and dbias
  bool training;       // mean and rstd depend on x
  Activation activation;
  const void* dy;       // activation tensor, or a single element where dy_is_scalar
  bool dy_is_scalar;    // dy is one value expanded to the whole shape, as y.sum().backward() makes it
  const void* x;        // activation tensor
  const void* z;        // activation tensor; null: there was no residual, or it is not needed
  const uint8_t* mask;  // of the forward pass; null: activation' is computed from u + z
  const void* mean;     // saved
  const void* rstd;     // saved
  const void* scale;    // saved
  const void* offset;   // saved
  void* dx;             // activation tensor; null: not wanted
  void* dz;             // activation tensor; null: not wanted
  void* dweight;        // params dtype; null: not wanted
  void* dbias;          // params dtype; null: not wanted

  constexpr bool needs_sums() const { return dweight || dbias || (dx && training); }
  constexpr bool needs_u() const { return activation.kind != ActivationKind::kNone && mask == nullptr; }
};

}  // namespace bn_ext
