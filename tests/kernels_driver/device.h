// The device: what it can do, its memory, and that no call of CUDA's goes unchecked.
#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/cuda/plan.h"
#include "numbers.h"

namespace kernels_driver {

// Throws a sentence unless CUDA has done what it was asked.
void check(cudaError_t error, const char* what);

// The current device, for the planner.
bn_ext::cuda::Machine ask_machine();

// An allocation of its own, so that compute-sanitizer sees what is read or written past its end. The tensor in it
// begins `misalignment` bytes on.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes, size_t misalignment = 0);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return static_cast<unsigned char*>(allocation_) + misalignment_; }
  void write(const Bytes& values, size_t begin = 0) const;
  void fill_poison() const;  // 0xff bytes: NaN in every float type
  Bytes read(size_t bytes) const;

 private:
  void* allocation_ = nullptr;
  size_t bytes_;
  size_t misalignment_;
};

}  // namespace kernels_driver
