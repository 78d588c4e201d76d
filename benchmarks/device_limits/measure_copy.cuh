// Part "copy": what memory gives at most. Reads, writes, copies and additions of 1 GiB tensors; how much must be in
// flight; what short blocks cost.
#pragma once

#include "session.cuh"
#include "stream.cuh"

namespace device_limits {

constexpr int kWarpsOfBlock = kThreads / bn_ext::cuda::kWarpThreads;

// Launches stream_kernel on vectors [first, first + vectors) of the pools. Sums go where `sums` points to.
template <int kInputs, bool kWrites, Hint kHint, int kRows = 4>
void launch_stream(Session& session,
                   int64_t first,
                   int64_t vectors,
                   int64_t blocks,
                   unsigned* sums,
                   bool backwards = false,
                   size_t shared_bytes = 0) {
  const uint4* source = session.source + first;
  const Stream s = {{source, source + kPoolVectors / 2}, session.target + first, sums, vectors, backwards};
  session.launch(stream_kernel<kInputs, kWrites, kHint, kRows>, {blocks, kThreads, shared_bytes}, s);
}

// One figure of a kernel over so many vectors, checked.
template <int kInputs, bool kWrites, Hint kHint, int kRows = 4>
void measure_stream(Session& session, Line line, int64_t vectors, int64_t blocks, size_t shared_bytes = 0) {
  session.figure(std::move(line), [&](Line& line) {
    session.clear(session.target, kPoolBytes);
    session.clear(session.sums, kSumBytes);
    const Timing timing = session.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) {
        launch_stream<kInputs, kWrites, kHint, kRows>(session, 0, vectors, blocks, session.sums, false, shared_bytes);
      }
    });
    if (kWrites) {
      session.check_target(vectors, {kInputs == 2 ? kPoolVectors / 2 : 0});
    } else {
      session.check_sums(blocks * kWarpsOfBlock, session.sum_of_source(0, vectors));
    }
    line.add("bytes", (kInputs + kWrites) * vectors * kVectorBytes) << timing;
  });
}

inline void measure_driver(Session& session) {
  const auto line = [](const char* what) {
    return Line("copy").add("table", "ceilings").add("what", what).add("hint", "driver").add("grid", "driver");
  };
  session.figure(line("copy"), [&](Line& line) {
    session.clear(session.target, kPoolBytes);
    const Timing timing = session.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) {
        check(cudaMemcpyAsync(session.target, session.source, kPoolBytes, cudaMemcpyDeviceToDevice, session.stream),
              "cudaMemcpyAsync");
      }
    });
    session.check_target(kPoolVectors);
    line.add("bytes", 2 * kPoolBytes) << timing;
  });
  session.figure(line("write"), [&](Line& line) {
    const Timing timing = session.time(kBurst, [&] {
      for (int i = 0; i < kBurst; ++i) session.clear(session.target, kPoolBytes);
    });
    line.add("bytes", kPoolBytes) << timing;
  });
}

template <int kInputs, bool kWrites, Hint kHint>
void measure_ceilings(Session& session, const char* what, const char* hint) {
  const int64_t vectors = kInputs == 2 ? kPoolVectors / 2 : kPoolVectors;
  const auto line = [&](const char* grid) {
    return Line("copy").add("table", "ceilings").add("what", what).add("hint", hint).add("grid", grid);
  };
  measure_stream<kInputs, kWrites, kHint>(session, line("a block per 16 KiB"), vectors, vectors / (kThreads * 4));
  measure_stream<kInputs, kWrites, kHint>(session, line("resident"), vectors, session.multiprocessors * 8);
}

// Copies by a resident grid: how many bytes a multiprocessor must have asked for.
template <int kRows>
void measure_in_flight(Session& session) {
  for (int blocks : {1, 2, 3, 4, 6, 8}) {
    Line line("copy");
    line.add("table", "in flight").add("rows", kRows).add("blocks_per_sm", blocks);
    measure_stream<1, true, Hint::kStreaming, kRows>(
        session, std::move(line), kPoolVectors, session.multiprocessors * blocks);
  }
}

// Reads by grids of full waves of blocks of so many rows per thread, as many at a time as the general kernels have.
inline void measure_waves(Session& session) {
  const int at_a_time = session.multiprocessors * bn_ext::cuda::kBlocksAtATime;
  const size_t shared_bytes = session.shared_bytes / bn_ext::cuda::kBlocksAtATime - session.reserved_shared_bytes;
  for (int rows : {4, 8, 16, 32, 64, 128}) {
    const int64_t waves = kPoolVectors / (int64_t(at_a_time) * kThreads * rows);
    if (waves == 0) break;
    const int64_t blocks = waves * at_a_time;
    Line line("copy");
    line.add("table", "waves").add("rows", rows).add("waves", waves);
    measure_stream<1, false, Hint::kPlain>(session, std::move(line), blocks * kThreads * rows, blocks, shared_bytes);
  }
}

inline void measure_copy(Session& session) {
  measure_driver(session);
  measure_ceilings<1, true, Hint::kPlain>(session, "copy", "plain");
  measure_ceilings<1, true, Hint::kStreaming>(session, "copy", "streaming");
  measure_ceilings<1, true, Hint::kStreamingStores>(session, "copy", "streaming stores");
  measure_ceilings<2, true, Hint::kPlain>(session, "add", "plain");
  measure_ceilings<2, true, Hint::kStreaming>(session, "add", "streaming");
  measure_ceilings<1, false, Hint::kPlain>(session, "read", "plain");
  measure_ceilings<1, false, Hint::kStreaming>(session, "read", "streaming");
  measure_ceilings<0, true, Hint::kPlain>(session, "write", "plain");
  measure_ceilings<0, true, Hint::kStreaming>(session, "write", "streaming");
  measure_in_flight<1>(session);
  measure_in_flight<2>(session);
  measure_in_flight<4>(session);
  measure_in_flight<8>(session);
  measure_waves(session);
}

}  // namespace device_limits
