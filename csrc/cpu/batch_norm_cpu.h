// The CPU back-end: both passes over plain memory, in parallel.
#pragma once

#include "../params.h"

namespace bn_ext::cpu {

void forward(const ForwardParams& p);
void backward(const BackwardParams& p);

}  // namespace bn_ext::cpu
