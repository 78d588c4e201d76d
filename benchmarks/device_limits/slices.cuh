// A channels_last tensor read or copied slice by slice: what narrow slices of wide pixels cost.
#pragma once

#include "stream.cuh"

namespace device_limits {

struct Slices {
  const uint4* x;    // (pixels, pitch)
  uint4* y;          // the same, where it is written
  unsigned* sums;    // (blocks, warps), where y is not
  int64_t segments;  // of a slice, one block each: pixels / (rows * kThreads / width)
  int pitch;         // of a pixel, in vectors of 16 bytes
  int width;         // of a slice, the same; divides pitch and kThreads
  int rows;          // of a thread, a multiple of kRows
};

// y = x, or the sum of x's words. Grid: (slices, segments) blocks of kThreads, a slice's side by side, as a team's are;
// `width` threads stand beside each other, the others behind them, and a thread walks down `rows` pixels, kThreads /
// width apart. Moves 16 bytes per vector, and the same for y.
template <bool kWrites, int kRows>
__global__ void __launch_bounds__(kThreads) slices_kernel(const Slices s) {
  const int64_t slice = blockIdx.x / s.segments, segment = blockIdx.x % s.segments;
  const int lanes = kThreads / s.width;
  const int column = static_cast<int>(threadIdx.x) % s.width, lane = static_cast<int>(threadIdx.x) / s.width;
  const int64_t step = int64_t(lanes) * s.pitch;
  int64_t at = (segment * s.rows * lanes + lane) * s.pitch + slice * s.width + column;
  unsigned sum = 0;
  for (int done = 0; done < s.rows; done += kRows) {
    uint4 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows[i] = load_vector<Hint::kStreaming>(s.x + at + i * step);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kWrites) {
        store_vector<Hint::kStreaming>(s.y + at + i * step, rows[i]);
      } else {
        sum += sum_of(rows[i]);
      }
    }
    at += kRows * step;
  }
  if constexpr (!kWrites) leave_sum(s.sums, sum);
}

}  // namespace device_limits
