// One type's kernels, BN_EXT_TYPE's, for any processor: 16-byte vectors, which x86-64 (SSE2) and arm64 (NEON) always
// have.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <type_traits>

#include "../kernels.h"

namespace bn_ext::cpu {
namespace baseline {
constexpr int kVectorBytes = 16;
#include "../table.inl"
}  // namespace baseline
}  // namespace bn_ext::cpu
