// Copies from global to shared memory that run while their thread goes on: as late as that is allowed, or now and then
// at once.
#include <algorithm>
#include <cstring>

#include "include/cuda_pipeline.h"
#include "scheduler.h"

namespace cuda_on_cpu {

void copy_async(void* shared, const void* global, std::size_t bytes, Place place) {
  Thread& thread = running_thread();
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    scheduler.fault("a copy of " + std::to_string(bytes) + " bytes: it may have 4, 8 or 16", place);
  }
  const auto* to = static_cast<unsigned char*>(shared);
  const GuardedMemory& memory = *thread.block->shared;
  if (to < memory.data() || to + bytes > memory.data() + memory.bytes()) {
    scheduler.fault("a copy goes to what is not its block's shared memory", place);
  }
  if ((to - memory.data()) % static_cast<std::ptrdiff_t>(bytes) != 0) {
    scheduler.fault("a copy goes to a misaligned address", place);
  }
  check_access(Direction::read, global, bytes, place);
  if (scheduler.hurries()) {
    std::memcpy(shared, global, bytes);
  } else {
    thread.copies.back().push_back({shared, global, bytes});
  }
}

void commit_copies() { running_thread().copies.emplace_back(); }

// The open group is not one that is waited for.
void wait_for_copies(std::size_t groups_left) {
  std::vector<CopyGroup>& copies = running_thread().copies;
  const std::size_t groups = copies.size() - 1;
  const auto end = copies.begin() + static_cast<std::ptrdiff_t>(groups - std::min(groups, groups_left));
  for (auto group = copies.begin(); group != end; ++group) {
    for (const PendingCopy& copy : *group) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(copies.begin(), end);
  for (const CopyGroup& group : copies) {
    for (const PendingCopy& copy : group) count_awaited_later(copy.bytes);
  }
}

}  // namespace cuda_on_cpu
