// The kernels for the type BN_EXT_TYPE on processors with AVX-512 (F, BW, DQ, VL).
// Headers precede the target pragma, so that their inline functions are compiled for the baseline only.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC's intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bn_ext::cpu {
namespace avx512 {
#define BN_EXT_AVX512
constexpr int kVectorBytes = 64;
#include "../table.inl"
}  // namespace avx512
}  // namespace bn_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
