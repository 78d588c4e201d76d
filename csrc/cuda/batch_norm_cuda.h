// The CUDA back-end: both passes over device memory, on the current stream of the device of this number, which is the
// current one. Nothing waits for the device.
// Implemented by unavailable.cpp where no kernel is built.
#pragma once

#include "../params.h"

namespace bn_ext::cuda {

void forward(const ForwardParams& p, int device);
void backward(const BackwardParams& p, int device);

}  // namespace bn_ext::cuda
