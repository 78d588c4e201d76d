// CUDA's calls for memory and for what the device can do.
#include "device.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "../../csrc/cuda/kernels.h"

namespace kernels_driver {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next call does not find it
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// As batch_norm_cuda.cpp asks.
bn_ext::cuda::Machine ask_machine() {
  int architecture = 0;
  check(bn_ext::cuda::ask_compiled_for(architecture), "asking what kernels are compiled for");
  const bool is_hopper_or_newer = attribute(cudaDevAttrClusterLaunch) != 0 && architecture >= 90;
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          /*clusters=*/is_hopper_or_newer,
          attribute(cudaDevAttrCooperativeLaunch) != 0,
          /*pdl=*/is_hopper_or_newer};
}

DeviceMemory::DeviceMemory(size_t bytes, size_t misalignment) : bytes_(bytes), misalignment_(misalignment) {
  check(cudaMalloc(&allocation_, bytes + misalignment), "cudaMalloc");
}

DeviceMemory::~DeviceMemory() {
  if (allocation_ != nullptr) (void)cudaFree(allocation_);  // after an error it may fail, and that has been reported
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : allocation_(std::exchange(other.allocation_, nullptr)),
      bytes_(other.bytes_),
      misalignment_(other.misalignment_) {}

void DeviceMemory::write(const Bytes& values, size_t begin) const {
  void* to = static_cast<unsigned char*>(data()) + begin;
  check(cudaMemcpy(to, values.data(), values.size(), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
}

void DeviceMemory::fill_poison() const { check(cudaMemset(data(), 0xff, bytes_), "cudaMemset"); }

Bytes DeviceMemory::read(size_t bytes) const {
  Bytes values(bytes);
  check(cudaMemcpy(values.data(), data(), bytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  return values;
}

}  // namespace kernels_driver
