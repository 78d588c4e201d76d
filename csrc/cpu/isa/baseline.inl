// The kernels for the type BN_EXT_TYPE on any processor, with 16-byte vectors: all x86-64 (SSE2) and arm64 (NEON)
// processors have them.
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
