// Memory that a result is about to be written to.
#pragma once

#include <cstdint>

namespace bn_ext::cpu {

// Where the memory of a large result is new to this process, asks the system for huge pages there: then the first
// writes cost a page fault for every 2 MiB instead of every 4 KiB. One page in the middle tells whether it is new.
void expect_writes(void* data, int64_t bytes);

}  // namespace bn_ext::cpu
