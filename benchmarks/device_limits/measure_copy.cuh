// Part "copy": what memory gives at most. Reads, writes, copies and additions of 1 GiB tensors; how much must be in
// flight; what short blocks cost.
#pragma once

#include "gpu.cuh"
#include "stream.cuh"

namespace device_limits {

constexpr int kWarpsOfBlock = kThreads / bn_ext::cuda::kWarpThreads;

// Launches stream_kernel on vectors [first, first + vectors) of the pools. Sums go where `sums` points to.
template <int kInputs, bool kWrites, Hint kHint, int kRows = 4>
void launch_stream(Gpu& gpu,
                   int64_t first,
                   int64_t vectors,
                   int64_t blocks,
                   unsigned* sums,
                   bool backwards = false,
                   size_t shared_bytes = 0) {
  const uint4* source = gpu.source + first;
  const Stream s = {{source, source + kPoolVectors / 2}, gpu.target + first, sums, vectors, backwards};
  gpu.launch(stream_kernel<kInputs, kWrites, kHint, kRows>, {blocks, kThreads, shared_bytes}, s);
}

// One figure of a kernel over so many vectors, checked.
template <int kInputs, bool kWrites, Hint kHint, int kRows = 4>
void measure_stream(Gpu& gpu, Line line, int64_t vectors, int64_t blocks, size_t shared_bytes = 0) {
  gpu.figure(std::move(line), [&](Line& line) {
    gpu.clear(gpu.target, kPoolBytes);
    gpu.clear(gpu.sums, kSumBytes);
    const Timing timing = gpu.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) {
        launch_stream<kInputs, kWrites, kHint, kRows>(gpu, 0, vectors, blocks, gpu.sums, false, shared_bytes);
      }
    });
    if (kWrites) {
      gpu.check_target(vectors, {kInputs == 2 ? kPoolVectors / 2 : 0});
    } else {
      gpu.check_sums(blocks * kWarpsOfBlock, gpu.sum_of_source(0, vectors));
    }
    line.add("bytes", (kInputs + kWrites) * vectors * kVectorBytes) << timing;
  });
}

inline void measure_driver(Gpu& gpu) {
  const auto line = [](const char* what) {
    return Line("copy").add("table", "ceilings").add("what", what).add("hint", "driver").add("grid", "driver");
  };
  gpu.figure(line("copy"), [&](Line& line) {
    gpu.clear(gpu.target, kPoolBytes);
    const Timing timing = gpu.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) {
        check(cudaMemcpyAsync(gpu.target, gpu.source, kPoolBytes, cudaMemcpyDeviceToDevice, gpu.stream),
              "cudaMemcpyAsync");
      }
    });
    gpu.check_target(kPoolVectors);
    line.add("bytes", 2 * kPoolBytes) << timing;
  });
  gpu.figure(line("write"), [&](Line& line) {
    const Timing timing = gpu.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) gpu.clear(gpu.target, kPoolBytes);
    });
    line.add("bytes", kPoolBytes) << timing;
  });
}

template <int kInputs, bool kWrites, Hint kHint>
void measure_ceilings(Gpu& gpu, const char* what, const char* hint) {
  const int64_t vectors = kInputs == 2 ? kPoolVectors / 2 : kPoolVectors;
  const auto line = [&](const char* grid) {
    return Line("copy").add("table", "ceilings").add("what", what).add("hint", hint).add("grid", grid);
  };
  measure_stream<kInputs, kWrites, kHint>(gpu, line("a block per 16 KiB"), vectors, vectors / (kThreads * 4));
  measure_stream<kInputs, kWrites, kHint>(gpu, line("resident"), vectors, gpu.multiprocessors * 8);
}

// Copies by a resident grid: how many bytes a multiprocessor must have asked for.
template <int kRows>
void measure_in_flight(Gpu& gpu) {
  for (int blocks : {1, 2, 3, 4, 6, 8}) {
    Line line("copy");
    line.add("table", "in flight").add("rows", kRows).add("blocks_per_sm", blocks);
    measure_stream<1, true, Hint::kStreaming, kRows>(gpu, std::move(line), kPoolVectors, gpu.multiprocessors * blocks);
  }
}

// Reads by grids of full waves of blocks of so many rows per thread, as many at a time as the multi-kernel path has.
inline void measure_waves(Gpu& gpu) {
  const int at_a_time = gpu.multiprocessors * bn_ext::cuda::kBlocksAtATime;
  const size_t shared_bytes = gpu.shared_bytes / bn_ext::cuda::kBlocksAtATime - gpu.reserved_shared_bytes;
  for (int rows : {4, 8, 16, 32, 64, 128}) {
    const int64_t waves = kPoolVectors / (int64_t(at_a_time) * kThreads * rows);
    if (waves == 0) break;
    const int64_t blocks = waves * at_a_time;
    Line line("copy");
    line.add("table", "waves").add("rows", rows).add("waves", waves);
    measure_stream<1, false, Hint::kPlain>(gpu, std::move(line), blocks * kThreads * rows, blocks, shared_bytes);
  }
}

inline void measure_copy(Gpu& gpu) {
  measure_driver(gpu);
  measure_ceilings<1, true, Hint::kPlain>(gpu, "copy", "plain");
  measure_ceilings<1, true, Hint::kStreaming>(gpu, "copy", "streaming");
  measure_ceilings<1, true, Hint::kStreamingStores>(gpu, "copy", "streaming stores");
  measure_ceilings<2, true, Hint::kPlain>(gpu, "add", "plain");
  measure_ceilings<2, true, Hint::kStreaming>(gpu, "add", "streaming");
  measure_ceilings<1, false, Hint::kPlain>(gpu, "read", "plain");
  measure_ceilings<1, false, Hint::kStreaming>(gpu, "read", "streaming");
  measure_ceilings<0, true, Hint::kPlain>(gpu, "write", "plain");
  measure_ceilings<0, true, Hint::kStreaming>(gpu, "write", "streaming");
  measure_in_flight<1>(gpu);
  measure_in_flight<2>(gpu);
  measure_in_flight<4>(gpu);
  measure_in_flight<8>(gpu);
  measure_waves(gpu);
}

}  // namespace device_limits
