// The complete contract between batch_norm.cpp (tensors) and a back-end (plain memory). Includes no torch header.
#pragma once

#include <cstdint>

namespace bn_ext {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// The shape of an activation tensor: N images, C channels, S positions (product of spatial sizes; 1 for (N, C) input).
struct Shape {
  int64_t n;
  int64_t c;
  int64_t s;
  bool channels_last;  // false: (N, C, S) contiguous; true: (N, S, C) contiguous

  constexpr int64_t values_per_channel() const { return n * s; }
  constexpr int64_t numel() const { return n * c * s; }
};

// The function that is applied after the normalisation and the addition of the residual. kNone: no function.
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
  double alpha;  // kReluLike: slope for values that do not pass; kElu: its alpha
  double upper;  // kReluLike: values >= upper do not pass either; NaN: no upper limit
};

// A mask has one bit per value, in memory order: bit i % 8 of byte i / 8 is 1 if value i passed. The extra bytes allow
// 4-byte reads that begin at the byte of any bit.
constexpr int64_t mask_bytes(int64_t numel) { return numel / 8 + 4; }

// Whether `value` is finite and within the range of `dtype`.
constexpr bool can_hold(DType dtype, double value) {
  const double largest = dtype == DType::kFloat16    ? 65504
                         : dtype == DType::kBFloat16 ? 0x1.FEp+127
                         : dtype == DType::kFloat32  ? 0x1.FFFFFEp+127
                                                     : 0x1.FFFFFFFFFFFFFp+1023;
  return -largest <= value && value <= largest;
}

// u = (x - mean) * scale + offset, y = activation(u + z); scale = rstd * weight, and offset is bias, corrected for the
// rounding of mean. Per-channel vectors are (C,), contiguous. "params" are weight, bias, running_mean and running_var.
// "saved" are mean, rstd, scale and offset, in float64 for float64 activation tensors, otherwise in float32. dweight
// and dbias have the params dtype.
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
  void* running_mean;            // params dtype; null: not tracked. Written in training only
  void* running_var;             // params dtype; null if and only if running_mean is null
  int64_t* num_batches_tracked;  // one value, incremented in training; null: not tracked
  bool cumulative;               // running statistics are means over all batches (momentum=None)
  double momentum;               // weight of this batch in the running statistics; unused if cumulative
  bool skip_nonfinite;           // do not update the running statistics of a channel to inf or NaN
  double eps;
  void* y;        // activation tensor
  void* mean;     // saved
  void* rstd;     // saved, 1 / sqrt(var + eps)
  void* scale;    // saved
  void* offset;   // saved
  uint8_t* mask;  // mask_bytes(numel) bytes, for kReluLike only; null: not wanted
};

// g = dy * activation'(u + z) replaces dy in the formulas of batch norm; dz = g.
struct BackwardParams {
  Shape shape;
  DType dtype;         // of dy, x, z, dx and dz
  DType params_dtype;  // of dweight and dbias
  bool training;       // mean and rstd depend on x
  Activation activation;
  const void* dy;       // activation tensor; a single element if dy_is_scalar
  bool dy_is_scalar;    // dy is one value expanded to the whole shape, as by y.sum().backward()
  const void* x;        // activation tensor
  const void* z;        // activation tensor; null: no residual, or backward does not need it
  const uint8_t* mask;  // from the forward pass; null: activation' is computed from u + z
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
