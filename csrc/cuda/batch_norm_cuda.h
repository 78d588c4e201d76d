// The CUDA back-end: both passes over device memory. Implemented by unavailable.cpp where no kernel is built.
#pragma once

#include "../params.h"

namespace bn_ext::cuda {

void forward(const ForwardParams& p);
void backward(const BackwardParams& p);

}  // namespace bn_ext::cuda
