// Part "slices": a channels_last tensor of 1 GiB, read and copied in slices of 32, 64 and 128 bytes of every pixel,
// against whole pixels.
#pragma once

#include "measure_copy.cuh"
#include "slices.cuh"

namespace device_limits {

constexpr int64_t kSliceRows = 32;  // of a thread: 128 KiB per block, about what a resident block holds

template <bool kWrites>
void measure_slices_of(Gpu& gpu, int pitch_bytes, int slice_bytes) {
  Line line("slices");
  line.add("what", kWrites ? "copy" : "read").add("pitch", pitch_bytes).add("slice", slice_bytes);
  gpu.figure(std::move(line), [&](Line& line) {
    const int64_t pixels = kPoolBytes / pitch_bytes;
    const int pitch = pitch_bytes / kVectorBytes, width = slice_bytes / kVectorBytes, lanes = kThreads / width;
    const int64_t rows = std::min(kSliceRows, pixels / lanes), segments = pixels / (rows * lanes);
    const Slices s = {gpu.source, gpu.target, gpu.sums, segments, pitch, width, static_cast<int>(rows)};
    const int64_t blocks = segments * (pitch / width);
    gpu.clear(gpu.target, kPoolBytes);
    const Timing timing = gpu.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) gpu.launch(slices_kernel<kWrites, 4>, {blocks, kThreads}, s);
    });
    if (kWrites) {
      gpu.check_target(kPoolVectors);
    } else {
      gpu.check_sums(blocks * kWarpsOfBlock, gpu.sum_of_source(0, kPoolVectors));
    }
    line.add("bytes", (kWrites ? 2 : 1) * kPoolBytes) << timing;
  });
}

inline void measure_slices(Gpu& gpu) {
  const auto both = [&](int pitch, int slice) {
    measure_slices_of<false>(gpu, pitch, slice);
    measure_slices_of<true>(gpu, pitch, slice);
  };
  for (int pitch : {128, 256, 512, 1024, 2048, 4096}) {
    for (int slice : {32, 64, 128}) both(pitch, slice);
    if (pitch > 128) both(pitch, pitch);
  }
}

}  // namespace device_limits
