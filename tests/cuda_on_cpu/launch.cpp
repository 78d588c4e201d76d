// The device: what a launch must satisfy, the host's side of CUDA, and the functions that tests call.
#include "cuda_on_cpu.h"
#include "include/cuda_runtime.h"
#include "memory.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

// The limits of every device since compute capability 3.0.
constexpr unsigned kMaxBlockThreads = 1024;
constexpr unsigned kMaxBlockZ = 64;
constexpr unsigned kMaxGridX = 0x7fffffff;
constexpr unsigned kMaxGridYZ = 65535;

struct Device {
  Machine machine;
  Order order;
  Memory memory;
  std::int64_t launches = 0;
  cudaError_t last_error = cudaSuccess;
};

Device& device() {
  static auto* const instance = new Device;  // never destroyed: fibres may outlive static objects
  return *instance;
}

void replace_device() {
  device().~Device();
  new (&device()) Device;
}

cudaError_t refusal(const cudaLaunchConfig_t& config) {
  const auto [gx, gy, gz] = config.gridDim;
  const auto [bx, by, bz] = config.blockDim;
  if (gx == 0 || gy == 0 || gz == 0 || gx > kMaxGridX || gy > kMaxGridYZ || gz > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  if (bx == 0 || by == 0 || bz == 0 || bx > kMaxBlockThreads || by > kMaxBlockThreads || bz > kMaxBlockZ ||
      bx * by * bz > kMaxBlockThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > device().machine.shared_bytes) return cudaErrorInvalidValue;
  return cudaSuccess;
}

std::string ordinal(std::int64_t number) { return "launch " + std::to_string(number); }

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(void*), void* arguments) {
  if (current) scheduler.fault("a kernel cannot launch a kernel");
  if (config.numAttrs != 0) throw Fault("this harness knows no launch attributes yet");
  const cudaError_t error = refusal(config);
  if (error != cudaSuccess) return device().last_error = error;
  const Launch launch{++device().launches, config.gridDim, config.blockDim, config.dynamicSmemBytes, kernel, arguments};
  scheduler.run(launch, device().machine, device().order, device().memory);
  try {
    device().memory.check_guards();
  } catch (const Fault& fault) {
    throw Fault(ordinal(launch.number) + ": " + fault.what());
  }
  return cudaSuccess;
}

void check_access(Direction direction, const void* address, std::size_t bytes, Place place) {
  Thread& thread = running_thread();
  const std::string wrong = device().memory.access(direction, address, bytes, thread.accesses, thread.warp->sectors);
  if (!wrong.empty()) scheduler.fault(wrong, place);
  scheduler.maybe_preempt();
}

unsigned atomic_or(unsigned* address, unsigned value, Place place) {
  check_access(Direction::read, address, sizeof(unsigned), place);
  check_access(Direction::write, address, sizeof(unsigned), place);
  const unsigned old = *address;
  *address |= value;
  return old;
}

void set_machine(const Machine& machine) {
  if (machine.resident_blocks < 1) throw Fault("a machine has room for one block at least");
  device().machine = machine;
}
void set_order(const Order& order) { device().order = order; }
std::int64_t launch_count() { return device().launches; }
void* add_buffer(const BufferOptions& options) { return device().memory.add(options); }
Counters counters(Kind kind) { return device().memory.counters(kind); }
void reset_counters() { device().memory.reset_counters(); }
void check_guards() { device().memory.check_guards(); }
void check_written(const void* buffer, std::size_t element_bytes) {
  device().memory.check_written(buffer, element_bytes);
}
void reset() { replace_device(); }

}  // namespace cuda_on_cpu

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  cuda_on_cpu::device().memory.fill(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::device().last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}
