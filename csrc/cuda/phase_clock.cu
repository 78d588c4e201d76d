// Reads and clears the phase times, for lab/ and the tests, in a build with BN_EXT_PHASE_CLOCK; otherwise empty.
#ifdef BN_EXT_PHASE_CLOCK

#include "phase_clock.cuh"

using bn_ext::cuda::all_phase_times;
using bn_ext::cuda::PhaseTimes;

extern "C" {

// Writes the times since the last clearing to `to`: kClocks x kClockedSlices x kPhases numbers. If kernels from several
// files of instantiations/ ran, it writes the maxima. Returns CUDA's error. The device must be idle.
__attribute__((visibility("default"))) int bn_ext_read_phase_times(uint64_t* to) {
  constexpr int kNumbers = sizeof(PhaseTimes) / sizeof(uint64_t);
  for (int i = 0; i < kNumbers; ++i) to[i] = 0;
  for (const PhaseTimes* of_file : all_phase_times()) {
    uint64_t found[kNumbers];
    const cudaError_t error = cudaMemcpyFromSymbol(found, *of_file, sizeof(found));
    if (error != cudaSuccess) return error;
    for (int i = 0; i < kNumbers; ++i) to[i] = found[i] > to[i] ? found[i] : to[i];
  }
  return cudaSuccess;
}

__attribute__((visibility("default"))) int bn_ext_clear_phase_times() {
  const PhaseTimes none = {};
  for (const PhaseTimes* of_file : all_phase_times()) {
    const cudaError_t error = cudaMemcpyToSymbol(*of_file, &none, sizeof(none));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // extern "C"

#endif
