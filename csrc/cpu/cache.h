// The size of the processor's cache.
#pragma once

#include <cstdint>

namespace bn_ext::cpu {

// Bytes of the last-level cache that a core sees; BN_EXT_CPU_CACHE_BYTES in the environment says otherwise.
int64_t last_level_cache_bytes();

}  // namespace bn_ext::cpu
