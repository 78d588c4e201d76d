// The size of the processor's cache.
#pragma once

#include <cstdint>

namespace bn_ext::cpu {

// Bytes of the last-level cache that so many threads can count on, of those that the system reports.
int64_t usable_cache_bytes(int64_t reported, int threads);

// The same of what this processor reports; BN_EXT_CPU_CACHE_BYTES in the environment overrides it.
int64_t last_level_cache_bytes(int threads);

}  // namespace bn_ext::cpu
