// The choice of the instruction set whose kernels run on this processor.
#pragma once

#include "kernels.h"

namespace bn_ext::cpu {

// "avx512", "avx2" or "baseline": the best one that this processor supports, or a lower one that the environment
// variable BN_EXT_CPU_CAPABILITY names. Chosen at the first call. Throws std::invalid_argument for any other name.
const char* instruction_set();

// The kernels of instruction_set() for T.
template <typename T>
const Kernels<T>& kernels();

}  // namespace bn_ext::cpu
