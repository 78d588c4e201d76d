// Part "cache": how much of what was just read is still in L2 when it is read again.
#pragma once

#include "measure_copy.cuh"

namespace device_limits {

constexpr int kCacheMiB[] = {8, 16, 24, 32, 40, 48, 64, 96};

// Microseconds of `again` behind a read of the same MiB: both, less the read alone. Over and over with other memory of
// the pool, so that the first read finds nothing in the cache.
template <typename Again>
void measure_again(Session& session, const char* what, int mib, bool writes, const Again& again) {
  session.figure(Line("cache").add("what", what).add("mib", mib), [&](Line& line) {
    const int64_t vectors = mib * kMiB / kVectorBytes, calls = calls_over_pool(vectors);
    const int64_t blocks = session.multiprocessors * bn_ext::cuda::kBlocksAtATime, sums = blocks * kWarpsOfBlock;
    const auto read = [&](int64_t i) {
      launch_stream<1, false, Hint::kPlain>(session, i * vectors, vectors, blocks, session.sums + i * sums);
    };
    session.clear(session.target, kPoolBytes);
    const Timing once = session.time_in_graph(calls, read);
    const Timing twice = session.time_in_graph(calls, [&](int64_t i) {
      read(i);
      again(i * vectors, vectors, blocks, session.sums + (calls + i) * sums);
    });
    const unsigned expected = session.sum_of_source(0, calls * vectors);
    if (writes) {
      session.check_target(calls * vectors);
      session.check_sums(calls * sums, expected);
    } else {
      session.check_sums(2 * calls * sums, 2 * expected);
    }
    line.add("bytes", (writes ? 2 : 1) * vectors * kVectorBytes).add("first_us", once.median);
    line << Timing{twice.median - once.median, twice.best - once.best};
  });
}

// The same without anything read before: what `again` takes where its memory is in no cache.
template <typename Call>
void measure_cold_copy(Session& session, const char* what, int mib, const Call& call) {
  session.figure(Line("cache").add("what", what).add("mib", mib), [&](Line& line) {
    const int64_t vectors = mib * kMiB / kVectorBytes, calls = calls_over_pool(vectors);
    const int64_t blocks = session.multiprocessors * bn_ext::cuda::kBlocksAtATime;
    session.clear(session.target, kPoolBytes);
    const Timing timing = session.time_in_graph(calls, [&](int64_t i) { call(i * vectors, vectors, blocks, nullptr); });
    session.check_target(calls * vectors);
    line.add("bytes", 2 * vectors * kVectorBytes) << timing;
  });
}

inline void measure_cache(Session& session) {
  const auto read = [&](bool backwards) {
    return [&session, backwards](int64_t first, int64_t vectors, int64_t blocks, unsigned* sums) {
      launch_stream<1, false, Hint::kPlain>(session, first, vectors, blocks, sums, backwards);
    };
  };
  const auto copy = [&](int64_t first, int64_t vectors, int64_t blocks, unsigned*) {
    launch_stream<1, true, Hint::kPlain>(session, first, vectors, blocks, nullptr, true);
  };
  const auto streaming_copy = [&](int64_t first, int64_t vectors, int64_t blocks, unsigned*) {
    launch_stream<1, true, Hint::kStreaming>(session, first, vectors, blocks, nullptr, true);
  };
  for (int mib : kCacheMiB) {
    measure_again(session, "read backwards", mib, false, read(true));
    measure_again(session, "read forwards", mib, false, read(false));
    measure_again(session, "copy backwards", mib, true, copy);
    measure_again(session, "streaming copy backwards", mib, true, streaming_copy);
    measure_cold_copy(session, "streaming copy, nothing read before", mib, streaming_copy);
  }
}

}  // namespace device_limits
