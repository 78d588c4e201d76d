// Stands in for CUDA's header of this name: copies from global to shared memory that run while the thread goes on.
#pragma once

#include <cstddef>

#include "device_operations.h"

namespace cuda_on_cpu {

void copy_async(void* shared, const void* global, std::size_t bytes, Place place);
void commit_copies();
void wait_for_copies(std::size_t groups_left);

}  // namespace cuda_on_cpu

// What was copied is there when the thread has waited for it; before, it may be or not.
inline void __pipeline_memcpy_async(void* shared,
                                    const void* global,
                                    std::size_t bytes,
                                    cuda_on_cpu::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  cuda_on_cpu::copy_async(shared, global, bytes, place);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(std::size_t groups_left) { cuda_on_cpu::wait_for_copies(groups_left); }
