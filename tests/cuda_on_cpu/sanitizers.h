// What AddressSanitizer must be told of; nothing in a build without it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#ifdef __SANITIZE_ADDRESS__

constexpr bool kAddressSanitizer = true;

inline void poison(const void* memory, std::size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void unpoison(const void* memory, std::size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
inline void start_switch(void** save, const void* stack, std::size_t bytes) {
  __sanitizer_start_switch_fiber(save, stack, bytes);
}
inline void finish_switch(void* save, const void** left_stack, std::size_t* left_bytes) {
  __sanitizer_finish_switch_fiber(save, left_stack, left_bytes);
}

#else

constexpr bool kAddressSanitizer = false;

inline void poison(const void*, std::size_t) {}
inline void unpoison(const void*, std::size_t) {}
inline void start_switch(void**, const void*, std::size_t) {}
inline void finish_switch(void*, const void**, std::size_t*) {}

#endif

}  // namespace cuda_on_cpu
