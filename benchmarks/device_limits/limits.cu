// Measures what a GPU can do at most, in the ways that the package uses it: `limits SECONDS PART...` prints a line of
// JSON for each figure. run.py compiles and runs it; the parts are in the files measure_*.cuh.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "measure_barriers.cuh"
#include "measure_cache.cuh"
#include "measure_copy.cuh"
#include "measure_launches.cuh"
#include "measure_resident.cuh"
#include "measure_slices.cuh"

using namespace device_limits;

namespace {

struct Part {
  const char* name;
  void (*measure)(Gpu&);
};
constexpr Part kParts[] = {
    {"copy", measure_copy},
    {"launches", measure_launches},
    {"barriers", measure_barriers},
    {"resident", measure_resident},
    {"cache", measure_cache},
    {"slices", measure_slices},
};

void tell_device(const Gpu& gpu, double seconds) {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  check(cudaGetDeviceProperties(&properties, 0), "the device's properties");
  check(cudaDriverGetVersion(&driver), "the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "CUDA's version");
  Line("device")
      .add("name", properties.name)
      .add("compute_capability", std::to_string(gpu.major) + "." + std::to_string(gpu.minor))
      .add("multiprocessors", gpu.multiprocessors)
      .add("l2_bytes", properties.l2CacheSize)
      .add("memory_bytes", int64_t(properties.totalGlobalMem))
      .add("shared_bytes_per_multiprocessor", gpu.shared_bytes)
      .add("shared_bytes_per_block", int64_t(properties.sharedMemPerBlockOptin))
      .add("reserved_shared_bytes", gpu.reserved_shared_bytes)
      .add("registers_per_multiprocessor", properties.regsPerMultiprocessor)
      .add("clock_khz", Gpu::ask(cudaDevAttrClockRate))
      .add("memory_clock_khz", Gpu::ask(cudaDevAttrMemoryClockRate))
      .add("driver_cuda", driver)
      .add("runtime_cuda", runtime)
      .add("samples", kSamples)
      .add("start_seconds", seconds)
      .print();
}

// A part may take half of what is left, so that the next ones have some too.
void run(Gpu& gpu, const Part& part, double end) {
  const double begin = seconds_now();
  gpu.deadline = begin + (end - begin) / 2;
  Line(part.name).add("begins", true).print();
  bool complete = true;
  try {
    part.measure(gpu);
  } catch (const OutOfTime&) {
    complete = false;
  }
  Line(part.name).add("ends", true).add("complete", complete).add("seconds", seconds_now() - begin).print();
}

// Clocks rise only under load.
void warm_up(Gpu& gpu) {
  for (const double begin = seconds_now(); seconds_now() - begin < 0.3; gpu.wait()) {
    for (int i = 0; i < 20; ++i) {
      launch_stream<1, true, Hint::kPlain>(gpu, 0, kPoolVectors, gpu.multiprocessors * 8, nullptr);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double begin = seconds_now();
  if (count < 3) {
    std::fprintf(stderr, "limits: give the seconds that it may take, and the parts\n");
    return 2;
  }
  const double end = begin + std::atof(arguments[1]);
  try {
    Gpu gpu;
    warm_up(gpu);
    tell_device(gpu, seconds_now() - begin);
    for (int i = 2; i < count; ++i) {
      const auto named = [&](const Part& part) { return std::strcmp(part.name, arguments[i]) == 0; };
      const Part* part = std::find_if(std::begin(kParts), std::end(kParts), named);
      if (part == std::end(kParts)) {
        std::fprintf(stderr, "limits: there is no part %s\n", arguments[i]);
        return 2;
      }
      run(gpu, *part, end);
    }
  } catch (const Failure& failure) {
    std::fprintf(stderr, "limits: %s\n", failure.what());
    return 1;
  } catch (const Lost&) {
    std::fprintf(stderr, "limits: the device does not go on after that\n");
    return 1;
  }
  return 0;
}
