// The CUDA back-end: both passes over device memory, on the current stream of `device`, which must be the current
// device. The host does not wait for the device. In a build without kernels, unavailable.cpp implements these
// functions.
#pragma once

#include "../params.h"

namespace bn_ext::cuda {

void forward(const ForwardParams& p, int device);
void backward(const BackwardParams& p, int device);

}  // namespace bn_ext::cuda
