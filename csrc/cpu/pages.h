// Huge pages for the memory of large results.
#pragma once

#include <cstdint>

namespace bn_ext::cpu {

// Requests huge pages for the memory of a large result if it is new to this process. The first writes then cost a page
// fault for every 2 MiB instead of every 4 KiB. Whether the memory is new is checked for one page in the middle.
void expect_writes(void* data, int64_t bytes);

}  // namespace bn_ext::cpu
