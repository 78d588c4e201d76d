// Part "cache": how much of what was just read is still in L2 when it is read again.
#pragma once

#include "measure_copy.cuh"

namespace device_limits {

constexpr int kCacheMiB[] = {8, 16, 24, 32, 40, 48, 64, 96};

// Microseconds of `again` behind a read of the same MiB: both, less the read alone. Over and over with other memory of
// the pool, so that the first read finds nothing in the cache.
template <typename Again>
void measure_again(Gpu& gpu, const char* what, int mib, bool writes, const Again& again) {
  gpu.figure(Line("cache").add("what", what).add("mib", mib), [&](Line& line) {
    const int64_t vectors = mib * kMiB / kVectorBytes, calls = calls_over_pool(vectors);
    const int64_t blocks = gpu.multiprocessors * bn_ext::cuda::kBlocksAtATime, sums = blocks * kWarpsOfBlock;
    const auto read = [&](int64_t i) {
      launch_stream<1, false, Hint::kPlain>(gpu, i * vectors, vectors, blocks, gpu.sums + i * sums);
    };
    gpu.clear(gpu.target, kPoolBytes);
    const Timing once = gpu.time_in_graph(calls, read);
    const Timing twice = gpu.time_in_graph(calls, [&](int64_t i) {
      read(i);
      again(i * vectors, vectors, blocks, gpu.sums + (calls + i) * sums);
    });
    const unsigned expected = gpu.sum_of_source(0, calls * vectors);
    if (writes) {
      gpu.check_target(calls * vectors);
      gpu.check_sums(calls * sums, expected);
    } else {
      gpu.check_sums(2 * calls * sums, 2 * expected);
    }
    line.add("bytes", (writes ? 2 : 1) * vectors * kVectorBytes).add("first_us", once.median);
    line << Timing{twice.median - once.median, twice.best - once.best};
  });
}

// The same without anything read before: what `again` takes where its memory is in no cache.
template <typename Call>
void measure_cold_copy(Gpu& gpu, const char* what, int mib, const Call& call) {
  gpu.figure(Line("cache").add("what", what).add("mib", mib), [&](Line& line) {
    const int64_t vectors = mib * kMiB / kVectorBytes, calls = calls_over_pool(vectors);
    const int64_t blocks = gpu.multiprocessors * bn_ext::cuda::kBlocksAtATime;
    gpu.clear(gpu.target, kPoolBytes);
    const Timing timing = gpu.time_in_graph(calls, [&](int64_t i) { call(i * vectors, vectors, blocks, nullptr); });
    gpu.check_target(calls * vectors);
    line.add("bytes", 2 * vectors * kVectorBytes) << timing;
  });
}

inline void measure_cache(Gpu& gpu) {
  const auto read = [&](bool backwards) {
    return [&gpu, backwards](int64_t first, int64_t vectors, int64_t blocks, unsigned* sums) {
      launch_stream<1, false, Hint::kPlain>(gpu, first, vectors, blocks, sums, backwards);
    };
  };
  const auto copy = [&](int64_t first, int64_t vectors, int64_t blocks, unsigned*) {
    launch_stream<1, true, Hint::kPlain>(gpu, first, vectors, blocks, nullptr, true);
  };
  const auto streaming_copy = [&](int64_t first, int64_t vectors, int64_t blocks, unsigned*) {
    launch_stream<1, true, Hint::kStreaming>(gpu, first, vectors, blocks, nullptr, true);
  };
  for (int mib : kCacheMiB) {
    measure_again(gpu, "read backwards", mib, false, read(true));
    measure_again(gpu, "read forwards", mib, false, read(false));
    measure_again(gpu, "copy backwards", mib, true, copy);
    measure_again(gpu, "streaming copy backwards", mib, true, streaming_copy);
    measure_cold_copy(gpu, "streaming copy, nothing read before", mib, streaming_copy);
  }
}

}  // namespace device_limits
