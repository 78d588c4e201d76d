// The CUDA back-end: both passes over device memory, on the current device and stream. Nothing waits for the device.
// Implemented by unavailable.cpp where no kernel is built.
#pragma once

#include "../params.h"

namespace bn_ext::cuda {

void forward(const ForwardParams& p);
void backward(const BackwardParams& p);

}  // namespace bn_ext::cuda
