// Buffers between guard zones; which accesses are allowed; bytes and sectors.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <tuple>

#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::size_t kGuardBytes = 256;  // at least; the zone behind goes on to the end of the page
constexpr std::size_t kPageBytes = 4096;
constexpr unsigned char kPattern = 0xb7;
constexpr unsigned char kPoison = 0xff;
constexpr std::uint64_t kSectorBytes = 32;

// The first byte in [begin, end) that is not the pattern, or end.
const unsigned char* first_change(const unsigned char* begin, const unsigned char* end) {
  if (*begin == kPattern && std::memcmp(begin, begin + 1, end - begin - 1) == 0) return end;
  return std::find_if(begin, end, [](unsigned char byte) { return byte != kPattern; });
}

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

std::string bytes_words(std::size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

}  // namespace

GuardedMemory::GuardedMemory(std::size_t bytes, std::size_t misalignment) : bytes_(bytes) {
  const std::size_t before = kGuardBytes + misalignment;
  mapped_bytes_ = (before + bytes + kGuardBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<unsigned char*>(memory);
  data_ = mapped_ + before;
  unsigned char* behind = data_ + bytes;
  const std::size_t behind_bytes = mapped_ + mapped_bytes_ - behind;
  std::memset(mapped_, kPattern, before);
  std::memset(behind, kPattern, behind_bytes);
  poison(mapped_, before);
  poison(behind, behind_bytes);
}

GuardedMemory::~GuardedMemory() {
  unpoison(mapped_, mapped_bytes_);
  munmap(mapped_, mapped_bytes_);
}

void GuardedMemory::fill_poison() { std::memset(data_, kPoison, bytes_); }

std::string GuardedMemory::damage() {
  if (kAddressSanitizer) return {};  // it has reported the access itself, and the zones cannot be read
  unsigned char* behind = data_ + bytes_;
  unsigned char* end = mapped_ + mapped_bytes_;
  const unsigned char* changed = first_change(behind, end);
  std::string words;
  if (changed != end) {
    words = "at byte " + std::to_string(changed - data_) + ", past its end";
  } else if ((changed = first_change(mapped_, data_)) != data_) {
    words = "at byte " + std::to_string(changed - data_) + ", before its beginning";
  } else {
    return {};
  }
  std::memset(mapped_, kPattern, data_ - mapped_);
  std::memset(behind, kPattern, end - behind);
  return words;
}

void SectorRecord::add(std::uint32_t access, std::uint64_t sector) {
  if (access >= windows_.size()) windows_.resize(access + 1);
  Window& window = windows_[access];
  if (window.touched == 0) window.first = sector - 32;  // lanes may come from the last to the first
  const std::uint64_t distance = sector - window.first;
  if (distance < 64) {
    window.touched |= std::uint64_t{1} << distance;
  } else {
    strays_.push_back({access, sector});
  }
}

std::uint64_t SectorRecord::count() {
  const auto key = [](const Stray& stray) { return std::make_tuple(stray.access, stray.sector); };
  std::sort(strays_.begin(), strays_.end(), [&](const Stray& a, const Stray& b) { return key(a) < key(b); });
  const auto same = [&](const Stray& a, const Stray& b) { return key(a) == key(b); };
  std::uint64_t sectors = std::unique(strays_.begin(), strays_.end(), same) - strays_.begin();
  for (const Window& window : windows_) sectors += __builtin_popcountll(window.touched);
  return sectors;
}

void SectorRecord::clear() {
  windows_.clear();
  strays_.clear();
}

void* Memory::add(const BufferOptions& options) {
  buffers_.push_back(std::make_unique<Buffer>(options));
  GuardedMemory& memory = buffers_.back()->memory;
  if (options.contents == Contents::poison) memory.fill_poison();
  if (options.contents == Contents::copied && options.bytes > 0) {
    std::memcpy(memory.data(), options.source, options.bytes);
  }
  return memory.data();
}

void Memory::remove(const void* address) {
  const auto begins_there = [&](const auto& buffer) { return buffer->memory.data() == address; };
  const auto found = std::find_if(buffers_.begin(), buffers_.end(), begins_there);
  if (found == buffers_.end()) throw Fault("memory is freed where no buffer begins: " + nearest(number(address)));
  buffers_.erase(found);
}

void Memory::check_guards() {
  for (const auto& buffer : buffers_) {
    const std::string damage = buffer->memory.damage();
    if (!damage.empty()) throw Fault("'" + buffer->name + "' was written " + damage + " (guard zone changed)");
  }
}

void Memory::check_written(const void* address, std::size_t element_bytes) const {
  for (const auto& buffer : buffers_) {
    const unsigned char* data = buffer->memory.data();
    if (data != address) continue;
    const std::size_t elements = buffer->memory.bytes() / element_bytes;
    std::size_t unwritten = 0;
    std::size_t first = 0;
    for (std::size_t i = elements; i-- > 0;) {
      const unsigned char* element = data + i * element_bytes;
      if (!std::all_of(element, element + element_bytes, [](unsigned char byte) { return byte == kPoison; })) continue;
      ++unwritten;
      first = i;
    }
    if (unwritten == 0) return;
    throw Fault("'" + buffer->name + "' still holds poison at element " + std::to_string(first) + " (" +
                std::to_string(unwritten) + " of " + std::to_string(elements) +
                " elements): never written, or computed from poison");
  }
  throw Fault("check_written was given an address at which no buffer begins");
}

bool Memory::Buffer::holds(std::uintptr_t address, std::size_t bytes) const {
  const std::uintptr_t offset = address - number(memory.data());  // wraps for what lies before
  return offset < memory.bytes() && memory.bytes() - offset >= bytes;
}

void Memory::Buffer::note_written(const void* address, std::size_t bytes) {
  if (!written.empty()) std::memset(&written[number(address) - number(memory.data())], 1, bytes);
}

bool Memory::Buffer::was_written(const void* address, std::size_t bytes) const {
  return written.empty() || std::memchr(&written[number(address) - number(memory.data())], 0, bytes) == nullptr;
}

std::size_t Memory::Buffer::sector_of(const void* address) const {
  return number(address) / kSectorBytes - number(memory.data()) / kSectorBytes;
}

std::string Memory::nearest(std::uintptr_t address) const {
  std::string words = "there are no buffers";
  std::uintptr_t least = UINTPTR_MAX;
  for (const auto& buffer : buffers_) {
    const std::uintptr_t begin = number(buffer->memory.data());
    const std::uintptr_t end = begin + buffer->memory.bytes();
    const std::uintptr_t distance = address < begin ? begin - address : address >= end ? address - end : 0;
    if (distance >= least) continue;
    least = distance;
    words = "at byte " + std::string(address < begin ? "-" : "") +
            std::to_string(address < begin ? begin - address : address - begin) + " of '" + buffer->name +
            "', which has " + bytes_words(buffer->memory.bytes());
  }
  return words;
}

std::size_t Memory::find(std::uintptr_t address, std::size_t bytes) const {
  const auto holds = [&](const auto& buffer) { return buffer->holds(address, bytes); };
  return std::find_if(buffers_.begin(), buffers_.end(), holds) - buffers_.begin();
}

std::size_t Memory::find_all(const char* what, const void* address, std::size_t bytes) const {
  const std::size_t found = find(number(address), bytes);
  if (found < buffers_.size()) return found;
  throw Fault("a " + std::string(what) + " of " + bytes_words(bytes) +
              " outside every buffer: " + nearest(number(address)));
}

void Memory::copy(Direction direction, const void* address, std::size_t bytes) {
  Buffer& buffer = *buffers_[find_all("copy", address, bytes)];
  if (direction == Direction::write) buffer.note_written(address, bytes);
}

void Memory::fill(void* memory, int value, std::size_t bytes) {
  const std::size_t found = find_all("memset", memory, bytes);
  std::memset(memory, value, bytes);
  buffers_[found]->note_written(memory, bytes);
  Counters& counters = counters_of(*buffers_[found]);
  counters.bytes_written += bytes;
  counters.sector_bytes_written += (bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
}

std::string Memory::access(
    Direction direction, const void* pointer, std::size_t bytes, AccessCounts& counts, SectorRecords& records) {
  const std::uintptr_t address = number(pointer);
  if (recent_ >= buffers_.size() || !buffers_[recent_]->holds(address, bytes)) recent_ = find(address, bytes);
  const bool outside = recent_ == buffers_.size();
  if (outside || address % bytes != 0) {
    return (direction == Direction::read ? "a read of " : "a write of ") + bytes_words(bytes) +
           (outside ? " outside every buffer: " : " is misaligned: ") + nearest(address);
  }

  Buffer& buffer = *buffers_[recent_];
  if (direction == Direction::write) {
    buffer.note_written(pointer, bytes);
  } else if (!buffer.was_written(pointer, bytes)) {
    return "a read of " + bytes_words(bytes) + " that nothing has written: " + nearest(address);
  }
  Counters& counters = counters_of(buffer);
  (direction == Direction::read ? counters.bytes_read : counters.bytes_written) += bytes;
  if (direction == Direction::read && !buffer.prefetched.empty() && buffer.prefetched[buffer.sector_of(pointer)]) {
    counters.bytes_prefetched += bytes;
  }
  const std::size_t stream = 2 * recent_ + (direction == Direction::write);
  records[stream].add(counts[stream]++, address / kSectorBytes);
  return {};
}

std::string Memory::prefetch(const void* address) {
  const std::size_t found = find(number(address), 1);
  if (found == buffers_.size()) return "a prefetch outside every buffer: " + nearest(number(address));
  Buffer& buffer = *buffers_[found];
  buffer.prefetched.resize(buffer.sector_of(buffer.memory.data() + buffer.memory.bytes()) + 1);
  buffer.prefetched[buffer.sector_of(address)] = true;
  return {};
}

void Memory::count_sectors(SectorRecords& records) {
  for (std::size_t stream = 0; stream < records.size(); ++stream) {
    Counters& counters = counters_of(*buffers_[stream / 2]);
    std::uint64_t& bytes = stream % 2 == 0 ? counters.sector_bytes_read : counters.sector_bytes_written;
    bytes += kSectorBytes * records[stream].count();
    records[stream].clear();
  }
}

}  // namespace cuda_on_cpu
