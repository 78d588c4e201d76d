// The kernels for the type BN_EXT_TYPE on processors with AVX2, FMA and F16C.
// Headers precede the target pragma, so that their inline functions are compiled for the baseline only.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace bn_ext::cpu {
namespace avx2 {
#define BN_EXT_AVX2
constexpr int kVectorBytes = 32;
#include "../table.inl"
}  // namespace avx2
}  // namespace bn_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
