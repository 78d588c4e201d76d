// The simulated device as a test sees it: its machine, the order of its threads, its memory, what it counted.
//
// There is one device. A test describes the machine and the order, adds buffers, runs kernels on their addresses
// (cudaLaunchKernelEx runs a kernel to its end), then looks at the buffers and the counters. All that goes wrong is
// thrown as a Fault, from the launch or from the check that found it; the device can be used again afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_on_cpu {

// One sentence: launch, block, thread and line where they are known, and what is wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Machine {
  int resident_blocks = 4;                // blocks of a launch that run at once, interleaved
  std::size_t shared_bytes = 48u * 1024;  // dynamic shared memory that one block may ask for
  int multiprocessors = 1;                // that the resident blocks are shared by, evenly
};

// Which of the threads that could run does, and in which order blocks start. All depends on the seed only, so a fault
// can be had again. A thread runs until a barrier or warp operation; in the last two policies it is also interrupted
// at some accesses to global memory.
enum class Policy {
  ascending,   // the first one, of the first block
  descending,  // the last one, of the last block
  random,      // any
  priorities,  // blocks and warps have random priorities, which change now and then
};

struct Order {
  std::uint64_t seed = 0;
  Policy policy = Policy::ascending;
};

// Both hold from the next launch on.
void set_machine(const Machine& machine);
void set_order(const Order& order);

// Launches begun since the last reset, refused ones not counted. A Fault's "launch 2" is the second one.
std::int64_t launch_count();

// The kernels of these launches, as function pointers.
std::set<const void*> launched_kernels();

// What a device may refuse though it said that there is room: it is shared, or has no memory left.
enum class Call {
  launch,
  load,      // of a kernel's code, by cudaFuncGetAttributes
  allocate,  // by cudaMalloc
};

constexpr std::int64_t kForEver = -1;

// The next `granted` calls are as ever, and `refused` ones after them give this error. From a device that refuses for
// ever cudaGetLastError() does not clear it. Holds until the next reset.
struct Refusal {
  std::int64_t granted = 0;
  std::int64_t refused = 0;
  int error = 0;  // a cudaError_t
};
void refuse(Call call, const Refusal& refusal);

// The error that cudaGetLastError() would give.
int last_error();

// What the stream and the driver say of themselves: whether a graph is captured, which changes nothing else, and the
// version of CUDA that the driver is of. Holds until the next reset.
void set_capture(bool captures, int driver_version);

// Calls of the host's functions of CUDA that describe or use the device, in their order, since the last reset or
// clear_calls: a name each, that of a launch with its attributes, "cudaLaunchKernelEx cluster pdl".
const std::vector<std::string>& calls();
void clear_calls();

// What a buffer holds, for the counters.
enum class Kind { activation, parameter, workspace };
constexpr int kKinds = 3;

enum class Contents {
  poison,  // 0xff in every byte: a NaN in every float type, and what check_written looks for; may not be read unwritten
  copied,  // from memory of the caller
  zero,    // pages that no one touches cost nothing: for buffers of many GiB
};

struct BufferOptions {
  std::string name;  // in messages
  Kind kind = Kind::activation;
  std::size_t bytes = 0;
  std::size_t misalignment = 0;  // of the address from a multiple of 256, in bytes
  Contents contents = Contents::poison;
  const void* source = nullptr;  // of copied contents
};

// Memory that kernels may touch, with guard zones of 256 bytes or more on both sides. It lives until the next reset.
void* add_buffer(const BufferOptions& options);

// What kernels moved by __ldg ... __stcs. Sectors are 32 bytes; the k-th read (or write) of one buffer by the lanes
// of one warp is one access, in which a sector counts once. sector_bytes_read / bytes_read tells how coalesced it was.
struct Counters {
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
  std::uint64_t sector_bytes_read = 0;
  std::uint64_t sector_bytes_written = 0;
  std::uint64_t bytes_awaited_later = 0;  // after each wait for copies: bytes of those still on their way, added up
  std::uint64_t bytes_prefetched = 0;     // of those read: of sectors that had been asked for before
  std::uint64_t bytes_streamed = 0;       // of those written to any buffer: by __stcs
};

Counters counters(Kind kind);
void reset_counters();

// Throws if a guard zone of a buffer has changed. Each launch does this at its end.
void check_guards();

// Throws if an element of a buffer is still poison in all its bytes.
void check_written(const void* buffer, std::size_t element_bytes);

// Back to the beginning: no buffers, counters at zero, default machine and order.
void reset();

}  // namespace cuda_on_cpu
