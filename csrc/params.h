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

// Per-channel vectors are (C,), contiguous. "params" are weight, bias, running_mean and running_var.
// mean and rstd are float64 for float64 activations, else float32; dweight and dbias have the params dtype.
struct ForwardParams {
  Shape shape;
  DType dtype;                   // of x and y
  DType params_dtype;            // of params
  bool training;                 // statistics of the batch; false: running statistics
  const void* x;                 // activation
  const void* weight;            // params dtype; null: 1
  const void* bias;              // params dtype; null: 0
  void* running_mean;            // params dtype; null: not tracked. Written only in training
  void* running_var;             // params dtype; null exactly where running_mean is
  int64_t* num_batches_tracked;  // one value, raised by one in training; null: not tracked
  bool cumulative;               // running statistics are the mean over all batches (momentum=None)
  double momentum;               // weight of this batch in the running statistics; unused if cumulative
  double eps;
  void* y;     // activation
  void* mean;  // (C,), what y was normalised with
  void* rstd;  // (C,), 1 / sqrt(var + eps)
};

struct BackwardParams {
  Shape shape;
  DType dtype;         // of dy, x and dx
  DType params_dtype;  // of weight, dweight and dbias
  bool training;       // mean and rstd depend on x
  const void* dy;      // activation, or a single element where dy_is_scalar
  bool dy_is_scalar;   // dy is one value expanded to the whole shape, as y.sum().backward() makes it
  const void* x;       // activation
  const void* weight;  // params dtype; null: 1
  const void* mean;    // (C,), saved by the forward pass
  const void* rstd;    // (C,), saved by the forward pass
  void* dx;            // activation; null: not wanted
  void* dweight;       // params dtype; null: not wanted
  void* dbias;         // params dtype; null: not wanted
};

}  // namespace bn_ext
