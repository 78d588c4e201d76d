// The size of the processor's last-level cache.
#pragma once

#include <cstdint>

namespace bn_ext::cpu {

// Returns how many of the reported bytes of the last-level cache this many threads can count on.
int64_t usable_cache_bytes(int64_t reported, int threads);

// The same for the cache that this machine reports. The environment variable BN_EXT_CPU_CACHE_BYTES overrides it.
int64_t last_level_cache_bytes(int threads);

}  // namespace bn_ext::cpu
