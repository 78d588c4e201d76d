// The device: what a launch must satisfy, the host's side of CUDA, and the functions that tests call.
#include <cstring>
#include <limits>
#include <map>

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
constexpr std::size_t kUnaskedSharedBytes = 48u * 1024;  // that a kernel may have without an attribute
constexpr unsigned kMaxClusterBlocks = 8;                // on every device that has clusters

struct Device {
  Machine machine;
  Order order;
  Memory memory;
  std::int64_t launches = 0;
  std::set<const void*> kernels;  // that were launched
  cudaError_t last_error = cudaSuccess;
  Refusal refusals[3];  // of each Call
  bool captures = false;
  int driver_version = CUDART_VERSION;
  std::vector<std::string> calls;
};

struct Attributes {
  bool cooperative = false;
  bool uses_pdl = false;
  unsigned cluster_blocks = 1;
};

Device& device() {
  static auto* const instance = new Device;  // never destroyed: fibres may outlive static objects
  return *instance;
}

void replace_device() {
  device().~Device();
  new (&device()) Device;
}

void record(const std::string& call) { device().calls.push_back(call); }

// Shared memory that kernels have asked for. A kernel keeps its attributes as long as it is loaded, whatever machine a
// test describes next; one that has asked for all that there was, as those do that ask once, has all of that one too.
std::map<const void*, std::size_t>& asked_shared_bytes() {
  static std::map<const void*, std::size_t> bytes;
  return bytes;
}

std::size_t shared_bytes_of(const void* function) {
  const auto found = asked_shared_bytes().find(function);
  return found == asked_shared_bytes().end() ? kUnaskedSharedBytes : found->second;
}

Attributes attributes_of(const cudaLaunchConfig_t& config) {
  Attributes attributes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& [id, value] = config.attrs[i];
    if (id == cudaLaunchAttributeCooperative) {
      attributes.cooperative = value.cooperative != 0;
    } else if (id == cudaLaunchAttributeClusterDimension) {
      if (value.clusterDim.y != 1 || value.clusterDim.z != 1) throw Fault("this harness knows clusters along x only");
      attributes.cluster_blocks = value.clusterDim.x;
    } else if (id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      attributes.uses_pdl = value.programmaticStreamSerializationAllowed != 0;
    } else if (id != cudaLaunchAttributeIgnore) {
      throw Fault("this harness does not know launch attribute " + std::to_string(id));
    }
  }
  return attributes;
}

cudaError_t refusal(const cudaLaunchConfig_t& config, const Attributes& attributes, const void* function) {
  const auto [gx, gy, gz] = config.gridDim;
  const auto [bx, by, bz] = config.blockDim;
  if (gx == 0 || gy == 0 || gz == 0 || gx > kMaxGridX || gy > kMaxGridYZ || gz > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  if (bx == 0 || by == 0 || bz == 0 || bx > kMaxBlockThreads || by > kMaxBlockThreads || bz > kMaxBlockZ ||
      bx * by * bz > kMaxBlockThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const Machine& machine = device().machine;
  if (config.dynamicSmemBytes > machine.shared_bytes) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > shared_bytes_of(function)) return cudaErrorInvalidValue;
  if (attributes.cluster_blocks == 0 || gx % attributes.cluster_blocks != 0) return cudaErrorInvalidConfiguration;
  const auto room = static_cast<unsigned>(machine.resident_blocks / machine.multiprocessors * machine.multiprocessors);
  if (attributes.cluster_blocks > std::min(kMaxClusterBlocks, room)) return cudaErrorInvalidClusterSize;
  const std::uint64_t blocks = std::uint64_t{gx} * gy * gz;
  if (attributes.cooperative && blocks > room / attributes.cluster_blocks * attributes.cluster_blocks) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

// What the test wishes of this call.
cudaError_t wished(Call call) {
  Refusal& refusal = device().refusals[static_cast<int>(call)];
  if (refusal.refused == 0 || refusal.granted-- > 0) return cudaSuccess;
  refusal.granted = 0;
  if (refusal.refused != kForEver) --refusal.refused;
  return device().last_error = static_cast<cudaError_t>(refusal.error);
}

std::string ordinal(std::int64_t number) { return "launch " + std::to_string(number); }

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void (*body)(void*), void* arguments) {
  if (current) scheduler.fault("a kernel cannot launch a kernel");
  const Attributes attributes = attributes_of(config);
  record(std::string("cudaLaunchKernelEx") + (attributes.cluster_blocks > 1 ? " cluster" : "") +
         (attributes.cooperative ? " cooperative" : "") + (attributes.uses_pdl ? " pdl" : ""));
  const cudaError_t error = refusal(config, attributes, function);
  if (error != cudaSuccess) return device().last_error = error;
  if (const cudaError_t refused = wished(Call::launch); refused != cudaSuccess) return refused;
  device().kernels.insert(function);
  const Launch launch{++device().launches,
                      config.gridDim,
                      config.blockDim,
                      attributes.cluster_blocks,
                      attributes.cooperative,
                      attributes.uses_pdl,
                      config.dynamicSmemBytes,
                      body,
                      arguments};
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
  if (thread.waits_for_launches) {
    scheduler.fault("it touches global memory before it has waited for earlier launches", place);
  }
  const std::string wrong = device().memory.access(direction, address, bytes, thread.accesses, thread.warp->sectors);
  if (!wrong.empty()) scheduler.fault(wrong, place);
  scheduler.maybe_preempt();
}

void check_prefetch(const void* address, Place place) {
  if (running_thread().waits_for_launches) {
    scheduler.fault("it prefetches global memory before it has waited for earlier launches", place);
  }
  const std::string wrong = device().memory.prefetch(address);
  if (!wrong.empty()) scheduler.fault(wrong, place);
}

void count_awaited_later(std::size_t bytes) { device().memory.count_awaited_later(bytes); }
void count_streamed(std::size_t bytes) { device().memory.count_streamed(bytes); }

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  record("cudaFuncSetAttribute");
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) throw Fault("this harness knows no such attribute");
  const auto bytes = static_cast<std::size_t>(value);
  const std::size_t most = device().machine.shared_bytes;
  if (value < 0 || bytes > most) return device().last_error = cudaErrorInvalidValue;
  asked_shared_bytes()[function] = bytes == most ? std::numeric_limits<std::size_t>::max() : bytes;
  return cudaSuccess;
}

cudaError_t load() {
  record("cudaFuncGetAttributes");
  return wished(Call::load);
}

cudaError_t most_clusters(int* clusters, const void* function, const cudaLaunchConfig_t& config) {
  record("cudaOccupancyMaxActiveClusters");
  const unsigned blocks = attributes_of(config).cluster_blocks;
  const cudaError_t error = refusal(config, {false, false, blocks}, function);
  if (error != cudaSuccess && error != cudaErrorInvalidClusterSize) return device().last_error = error;
  *clusters = error == cudaSuccess ? device().machine.resident_blocks / static_cast<int>(blocks) : 0;
  return cudaSuccess;
}

cudaError_t blocks_per_multiprocessor(int* blocks, const void* function, int threads, std::size_t shared_bytes) {
  record("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const Machine& machine = device().machine;
  const std::size_t most_shared = std::min(machine.shared_bytes, shared_bytes_of(function));
  const bool fits = threads > 0 && unsigned(threads) <= kMaxBlockThreads && shared_bytes <= most_shared;
  *blocks = fits ? machine.resident_blocks / machine.multiprocessors : 0;
  return cudaSuccess;
}

void set_machine(const Machine& machine) {
  if (machine.multiprocessors < 1) throw Fault("a machine has one multiprocessor at least");
  if (machine.resident_blocks < 1) throw Fault("a machine has room for one block at least");
  device().machine = machine;
}
void set_order(const Order& order) { device().order = order; }
std::int64_t launch_count() { return device().launches; }
void refuse(Call call, const Refusal& refusal) { device().refusals[static_cast<int>(call)] = refusal; }
int last_error() { return device().last_error; }
void set_capture(bool captures, int driver_version) {
  device().captures = captures;
  device().driver_version = driver_version;
}
const std::vector<std::string>& calls() { return device().calls; }
void clear_calls() { device().calls.clear(); }
std::set<const void*> launched_kernels() { return device().kernels; }
void* add_buffer(const BufferOptions& options) { return device().memory.add(options); }
Counters counters(Kind kind) { return device().memory.counters(kind); }
void reset_counters() { device().memory.reset_counters(); }
void check_guards() { device().memory.check_guards(); }
void check_written(const void* buffer, std::size_t element_bytes) {
  device().memory.check_written(buffer, element_bytes);
}
void reset() { replace_device(); }

}  // namespace cuda_on_cpu

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  static std::int64_t count = 0;
  cuda_on_cpu::record("cudaMalloc");
  if (const cudaError_t refused = cuda_on_cpu::wished(cuda_on_cpu::Call::allocate)) return refused;
  *memory =
      cuda_on_cpu::device().memory.add({"allocation " + std::to_string(++count), cuda_on_cpu::Kind::activation, bytes});
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory != nullptr) cuda_on_cpu::device().memory.remove(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  using cuda_on_cpu::Direction;
  cuda_on_cpu::Memory& memory = cuda_on_cpu::device().memory;
  if (kind != cudaMemcpyHostToDevice) memory.copy(Direction::read, from, bytes);
  if (kind != cudaMemcpyDeviceToHost) memory.copy(Direction::write, to, bytes);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  return cudaMemsetAsync(memory, value, bytes, nullptr);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  cuda_on_cpu::record("cudaMemsetAsync");
  cuda_on_cpu::device().memory.fill(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  cuda_on_cpu::record("cudaStreamIsCapturing");
  *status = cuda_on_cpu::device().captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  cuda_on_cpu::record("cudaThreadExchangeStreamCaptureMode");
  std::swap(*mode, current);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  cuda_on_cpu::record("cudaDriverGetVersion");
  *version = cuda_on_cpu::device().driver_version;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  cuda_on_cpu::record("cudaGetDevice");
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cuda_on_cpu::record("cudaDeviceGetAttribute");
  const cuda_on_cpu::Machine& machine = cuda_on_cpu::device().machine;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = machine.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(machine.shared_bytes);
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch:
      *value = 1;
      return cudaSuccess;
  }
  throw cuda_on_cpu::Fault("this harness has no such attribute");
}

cudaError_t cudaGetLastError() {
  cuda_on_cpu::record("cudaGetLastError");
  cuda_on_cpu::Device& device = cuda_on_cpu::device();
  const bool is_lost = device.refusals[static_cast<int>(cuda_on_cpu::Call::launch)].refused == cuda_on_cpu::kForEver;
  return is_lost ? device.last_error : std::exchange(device.last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}
