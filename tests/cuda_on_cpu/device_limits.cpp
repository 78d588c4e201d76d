// The kernels of benchmarks/device_limits on the simulated device, for ctypes (test_device_limits.py).
#include "../../benchmarks/device_limits/barriers.cuh"
#include "../../benchmarks/device_limits/resident.cuh"
#include "../../benchmarks/device_limits/slices.cuh"
#include "c_api.h"
#include "cuda_on_cpu.h"

using namespace device_limits;
using bn_ext::cuda::Grid;
using cuda_on_cpu::Fault;
using cuda_on_cpu::reported;

namespace {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  const cudaError_t error = bn_ext::cuda::launch(kernel, grid, nullptr, arguments...);
  if (error != cudaSuccess) throw Fault(std::string("a launch failed: ") + cudaGetErrorString(error));
}

template <int kInputs, bool kWrites, Hint kHint>
void launch_stream(int64_t rows, int64_t blocks, const Stream& s) {
  const Grid grid = {blocks, kThreads};
  if (rows == 1) return launch(stream_kernel<kInputs, kWrites, kHint, 1>, grid, s);
  launch(stream_kernel<kInputs, kWrites, kHint, 4>, grid, s);
}

template <Barrier kBarrier>
void launch_barriers(int64_t blocks, int64_t threads, const Rounds& rounds) {
  const bool cluster = kBarrier == Barrier::kCluster || kBarrier == Barrier::kOneFence;
  launch(barrier_kernel<kBarrier>,
         {blocks, int(threads), 0, cluster ? rounds.team : 1, kBarrier >= Barrier::kCounter},
         rounds);
}

Grid grid_of(const Plan& plan) { return bn_ext::cuda::grid_of_teams(plan, 1, sizeof(unsigned)); }

bn_ext::cuda::Workspace workspace_of(const Plan& plan) {
  using cuda_on_cpu::add_buffer, cuda_on_cpu::Contents, cuda_on_cpu::Kind;
  void* counters = add_buffer({"counters", Kind::workspace, counter_bytes(plan), 0, Contents::zero});
  return {add_buffer({"workspace", Kind::workspace, workspace_of_teams(plan)}),
          static_cast<bn_ext::cuda::TeamCounters*>(counters)};
}

Plan plan_of_numbers(const int64_t* n) {
  return plan_of({Team(n[0]), int(n[1]), n[2], n[3], int(n[4]), int(n[5]), int(n[6])});
}

}  // namespace

extern "C" {

const char* limits_fill(uint4* y, int64_t vectors, int64_t blocks) {
  return reported([&] { launch(fill_kernel, {blocks, kThreads}, y, vectors); });
}

const char* limits_count_wrong(
    const uint4* y, int64_t vectors, int64_t second, const unsigned* keys, int64_t slice_vectors, unsigned* wrong) {
  return reported(
      [&] { launch(count_wrong_kernel, {3, kThreads}, y, vectors, Expected{second, keys, slice_vectors}, wrong); });
}

// what: "read", "write", "copy" or "add", by its first letter; hint as Hint's.
const char* limits_stream(const char* what,
                          int64_t hint,
                          const uint4* a,
                          const uint4* b,
                          uint4* y,
                          unsigned* sums,
                          int64_t vectors,
                          int64_t backwards,
                          int64_t rows,
                          int64_t blocks) {
  return reported([&] {
    const Stream s = {{a, b}, y, sums, vectors, backwards != 0};
    if (*what == 'r') return launch_stream<1, false, Hint::kPlain>(rows, blocks, s);
    if (*what == 'w') return launch_stream<0, true, Hint::kStreaming>(rows, blocks, s);
    if (*what == 'a') return launch_stream<2, true, Hint::kStreaming>(rows, blocks, s);
    if (Hint(hint) == Hint::kPlain) return launch_stream<1, true, Hint::kPlain>(rows, blocks, s);
    if (Hint(hint) == Hint::kStreaming) return launch_stream<1, true, Hint::kStreaming>(rows, blocks, s);
    launch_stream<1, true, Hint::kStreamingStores>(rows, blocks, s);
  });
}

const char* limits_slices(
    const uint4* x, uint4* y, unsigned* sums, int64_t pixels, int64_t pitch, int64_t width, int64_t rows) {
  return reported([&] {
    const int64_t segments = pixels / (rows * kThreads / width);
    const Slices s = {x, y, sums, segments, int(pitch), int(width), int(rows)};
    const Grid grid = {segments * (pitch / width), kThreads};
    if (y != nullptr) return launch(slices_kernel<true, 4>, grid, s);
    launch(slices_kernel<false, 4>, grid, s);
  });
}

const char* limits_barriers(int64_t kind,
                            int64_t blocks,
                            int64_t threads,
                            int64_t team,
                            int64_t rounds,
                            unsigned* counters,
                            unsigned* progress,
                            unsigned* wrong) {
  return reported([&] {
    const Rounds r = {int(rounds), int(team), 20, counters, progress, wrong};
    if (Barrier(kind) == Barrier::kBlock) return launch_barriers<Barrier::kBlock>(blocks, threads, r);
    if (Barrier(kind) == Barrier::kCluster) return launch_barriers<Barrier::kCluster>(blocks, threads, r);
    if (Barrier(kind) == Barrier::kOneFence) return launch_barriers<Barrier::kOneFence>(blocks, threads, r);
    if (Barrier(kind) == Barrier::kCounter) return launch_barriers<Barrier::kCounter>(blocks, threads, r);
    launch_barriers<Barrier::kCooperative>(blocks, threads, r);
  });
}

// numbers: TeamShape's, in its order.
const char* limits_exchange(const int64_t* numbers, int64_t rounds, unsigned* sums) {
  return reported([&] {
    const Plan plan = plan_of_numbers(numbers);
    launch(exchange_kernel, grid_of(plan), plan, int(rounds), sums, workspace_of(plan));
  });
}

const char* limits_resident(const int64_t* numbers, const unsigned* x, unsigned* y) {
  return reported([&] {
    const Plan plan = plan_of_numbers(numbers);
    launch(resident_copy_kernel, grid_of(plan), plan, x, y, workspace_of(plan));
  });
}

}  // extern "C"
