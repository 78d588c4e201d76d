// Memory between guard zones, the device's buffers, and the count of what warps move.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "include/device_operations.h"

namespace cuda_on_cpu {

class GuardedMemory {
 public:
  // The address is `misalignment` bytes past a multiple of 256. All bytes are zero.
  explicit GuardedMemory(std::size_t bytes, std::size_t misalignment = 0);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  void fill_poison();

  // Where a guard zone has changed, in words ("at byte 64, past its end"); empty if nowhere. Mends the zones.
  std::string damage();

 private:
  std::size_t bytes_;
  std::size_t mapped_bytes_;
  unsigned char* mapped_;
  unsigned char* data_;
};

// The sectors of a warp's accesses to one buffer in one direction.
//
// Lanes come one after another, with all their accesses, so all accesses of the warp are open at once: each is a bit
// per sector near the first one it met, and a list for those far away.
class SectorRecord {
 public:
  void add(std::uint32_t access, std::uint64_t sector);
  std::uint64_t count();  // of sectors, each once per access
  void clear();

 private:
  struct Window {
    std::uint64_t first = 0;
    std::uint64_t touched = 0;  // bit i: sector first + i
  };
  struct Stray {
    std::uint32_t access;
    std::uint64_t sector;
  };
  std::vector<Window> windows_;
  std::vector<Stray> strays_;
};

// For a thread: its accesses so far, by buffer and direction. For a warp: their sectors.
using AccessCounts = std::vector<std::uint32_t>;
using SectorRecords = std::vector<SectorRecord>;

class Memory {
 public:
  void* add(const BufferOptions& options);
  void remove(const void* address);  // throws where no buffer begins there
  void check_guards();
  void check_written(const void* buffer, std::size_t element_bytes) const;

  // Number of AccessCounts of a thread and of SectorRecords of a warp.
  std::size_t streams() const { return 2 * buffers_.size(); }

  // What is wrong with an access, in words; empty if nothing is, and then it has been counted.
  std::string access(Direction direction, const void* address, std::size_t bytes, AccessCounts& counts, SectorRecords&);
  // The same of a prefetch; what is read of its sector later is counted.
  std::string prefetch(const void* address);
  // Sets bytes of one buffer from the host, and counts them; throws where they are not all in it.
  void fill(void* address, int value, std::size_t bytes);
  // The host copies from or to a buffer; throws where the bytes are not all in one.
  void copy(Direction direction, const void* address, std::size_t bytes);
  // A wait has left copies of so many bytes on their way.
  void count_awaited_later(std::size_t bytes) { counters_[0].bytes_awaited_later += bytes; }
  void count_streamed(std::size_t bytes) { counters_[0].bytes_streamed += bytes; }
  // A warp has ended: take over its sectors.
  void count_sectors(SectorRecords& records);

  Counters counters(Kind kind) const { return counters_[static_cast<std::size_t>(kind)]; }
  void reset_counters() { counters_ = {}; }

 private:
  struct Buffer {
    Buffer(const BufferOptions& options)
        : name(options.name), kind(options.kind), memory(options.bytes, options.misalignment) {
      if (options.contents == Contents::poison) written.resize(options.bytes);
    }
    bool holds(std::uintptr_t address, std::size_t bytes) const;
    // For buffers of poison, else nothing is done and all is well.
    void note_written(const void* address, std::size_t bytes);
    bool was_written(const void* address, std::size_t bytes) const;
    std::size_t sector_of(const void* address) const;  // the first byte's is 0
    std::string name;
    Kind kind;
    GuardedMemory memory;
    std::vector<bool> prefetched;        // for each sector; empty before the first one is
    std::vector<unsigned char> written;  // for each byte, whether it was; empty where that is not asked
  };
  std::size_t find(std::uintptr_t address, std::size_t bytes) const;  // the number of buffers if in none
  std::string nearest(std::uintptr_t address) const;
  std::size_t find_all(const char* what, const void* address, std::size_t bytes) const;  // throws if in none
  Counters& counters_of(const Buffer& buffer) { return counters_[static_cast<std::size_t>(buffer.kind)]; }

  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::size_t recent_ = 0;  // the buffer of the last access
  std::array<Counters, kKinds> counters_;
};

}  // namespace cuda_on_cpu
