// Which instruction set's kernels run on this processor.
#pragma once

#include "kernels.h"

namespace bn_ext::cpu {

// "avx512", "avx2" or "baseline": the best of this processor, or a lesser one named by the environment variable
// BN_EXT_CPU_CAPABILITY. Chosen at the first call. Throws std::invalid_argument for a name that cannot run here.
const char* instruction_set();

// The kernels of instruction_set() for T.
template <typename T>
const Kernels<T>& kernels();

}  // namespace bn_ext::cpu
