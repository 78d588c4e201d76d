// The device that tests/kernels_driver finds where it is compiled for the simulated one: described before its main
// starts. When main has ended, the addresses of the kernels that were launched go to standard error, one a line.
#include <cstdio>
#include <cstdlib>

#include "cuda_on_cpu.h"

namespace {

// From the environment: CUDA_ON_CPU_MACHINE is how many blocks it has room for, and on how many multiprocessors, if not
// enough for the driver's largest teams; CUDA_ON_CPU_ORDER a policy and a seed, as "3 17".
struct SimulatedDevice {
  SimulatedDevice() {
    const char* machine = std::getenv("CUDA_ON_CPU_MACHINE");
    int blocks = 16, multiprocessors = 8;
    if (machine != nullptr) std::sscanf(machine, "%d %d", &blocks, &multiprocessors);
    cuda_on_cpu::set_machine({blocks, 227 * 1024, multiprocessors});
    const char* order = std::getenv("CUDA_ON_CPU_ORDER");
    int policy = 0, seed = 0;
    if (order == nullptr || std::sscanf(order, "%d %d", &policy, &seed) != 2) return;
    cuda_on_cpu::set_order({static_cast<std::uint64_t>(seed), static_cast<cuda_on_cpu::Policy>(policy)});
  }
  ~SimulatedDevice() {
    for (const void* kernel : cuda_on_cpu::launched_kernels()) std::fprintf(stderr, "%p\n", kernel);
  }
};

const SimulatedDevice kDevice;

}  // namespace
