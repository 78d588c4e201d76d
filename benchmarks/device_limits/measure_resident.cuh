// Part "resident": tensors that go through shared memory slice by slice, with a team's exchange between load and store,
// against a plain copy of the same size.
#pragma once

#include "measure_barriers.cuh"
#include "measure_copy.cuh"
#include "resident.cuh"

namespace device_limits {

constexpr int kTensorMiB[] = {13, 26, 51, 103, 206};

struct Schedule {
  const char* name;
  Team kind;
  int team;    // blocks
  bool stays;  // a grid that is resident as a whole and takes slices in turns; else as many teams as slices
};
constexpr Schedule kSchedules[] = {
    {"block", Team::kBlock, 1, false},
    {"block, resident grid", Team::kBlock, 1, true},
    {"cluster of 2", Team::kCluster, 2, false},
    {"cluster of 4", Team::kCluster, 4, false},
    {"cluster of 8", Team::kCluster, 8, false},
    {"team of 4 in a grid", Team::kGrid, 4, true},
    {"team of 16 in a grid", Team::kGrid, 16, true},
    {"team of 32 in a grid", Team::kGrid, 32, true},
    {"team of 64 in a grid", Team::kGrid, 64, true},
};

// A copy of a tensor of about so many MiB in full waves of teams: as few waves as there can be, of at most `most_rows`
// rows per thread, or of as many as fit where that is 0.
struct ResidentCopy {
  bn_ext::cuda::Grid grid;
  TeamShape shape;
  int64_t waves;

  ResidentCopy(const Gpu& gpu, const Schedule& schedule, const Placement& placement, int mib, int most_rows)
      : grid{schedule.team, placement.threads, placement.shared_bytes(gpu)},
        shape{schedule.kind, schedule.team, 1, 1, placement.threads, 1} {
    grid.cluster_blocks = schedule.kind == Team::kCluster ? schedule.team : 1;
    grid.cooperative = schedule.kind == Team::kGrid;
    const int64_t at_a_time = schedule.kind == Team::kCluster ? clusters_at_a_time(resident_copy_kernel, grid)
                                                              : teams_at_a_time(gpu, placement, schedule.team);
    const size_t bytes_for_one = bn_ext::cuda::SinglePassMemory(plan_of(shape), 1, sizeof(unsigned)).bytes;
    const int64_t row_bytes = int64_t(placement.threads) * kVectorBytes;
    const int64_t room = 1 + (grid.shared_bytes - bytes_for_one) / row_bytes;
    const int64_t fitting = most_rows == 0 ? room : std::min<int64_t>(room, most_rows);
    const int64_t bytes = mib * kMiB, wave_bytes = at_a_time * schedule.team * row_bytes;  // of one row per thread
    waves = std::max<int64_t>(1, (bytes + fitting * wave_bytes - 1) / (fitting * wave_bytes));
    const int64_t nearest = (bytes + waves * wave_bytes / 2) / (waves * wave_bytes);
    shape.rows = static_cast<int>(most_rows == 0 ? std::max<int64_t>(1, nearest) : fitting);
    shape.slices = at_a_time * waves;
    shape.teams = schedule.stays ? at_a_time : shape.slices;
    grid.blocks = shape.teams * schedule.team;
  }
};

// Calls go round over the pool, so no tensor is in a cache.
inline void measure_schedule(Gpu& gpu, const Schedule& schedule, const Placement& placement, int mib, int most_rows) {
  Line line("resident");
  line.add("table", most_rows == 0 ? "tensors" : "rows").add("schedule", schedule.name).add("mib", mib);
  line.add("blocks_per_sm", placement.blocks_per_sm).add("threads", placement.threads);
  gpu.figure(std::move(line), [&](Line& line) {
    const ResidentCopy copy(gpu, schedule, placement, mib, most_rows);
    const Plan plan = plan_of(copy.shape);
    const int64_t slice_vectors = plan.slice_width / plan.vector, vectors = slice_vectors * plan.slices;
    const int64_t calls = calls_over_pool(vectors);
    gpu.clear(gpu.target, kPoolBytes);
    gpu.clear(gpu.sums, counter_bytes(plan));
    const Timing timing = gpu.time_in_graph(calls, [&](int64_t i) {
      const auto* x = reinterpret_cast<const unsigned*>(gpu.source + i * vectors);
      auto* y = reinterpret_cast<unsigned*>(gpu.target + i * vectors);
      gpu.launch(resident_copy_kernel, copy.grid, plan, x, y, workspace_at(gpu.sums, plan));
    });

    std::vector<unsigned> keys;
    for (int64_t i = 0; i < calls * plan.slices; ++i) {
      keys.push_back(key_of(gpu.sum_of_source(i * slice_vectors, slice_vectors), schedule.team));
    }
    check(cudaMemcpy(gpu.sums, keys.data(), keys.size() * sizeof(unsigned), cudaMemcpyHostToDevice), "keys");
    gpu.check_target(calls * vectors, {0, gpu.sums, slice_vectors});
    line.add("rows", copy.shape.rows).add("waves", copy.waves).add("bytes", 2 * vectors * kVectorBytes) << timing;
  });
}

inline void measure_copy_of(Gpu& gpu, int mib) {
  gpu.figure(Line("resident").add("table", "copies").add("mib", mib), [&](Line& line) {
    const int64_t vectors = mib * kMiB / kVectorBytes / (kThreads * 4) * (kThreads * 4);
    const int64_t calls = calls_over_pool(vectors);
    gpu.clear(gpu.target, kPoolBytes);
    const Timing timing = gpu.time_in_graph(calls, [&](int64_t i) {
      launch_stream<1, true, Hint::kStreaming>(gpu, i * vectors, vectors, vectors / (kThreads * 4), nullptr);
    });
    gpu.check_target(calls * vectors);
    line.add("bytes", 2 * vectors * kVectorBytes) << timing;
  });
}

inline void measure_resident(Gpu& gpu) {
  for (int mib : kTensorMiB) measure_copy_of(gpu, mib);
  const auto all = [&](const Placement& placement, int mib, int most_rows) {
    for (const Schedule& schedule : kSchedules) {
      if (schedule.kind == Team::kCluster && !gpu.has_clusters()) continue;
      measure_schedule(gpu, schedule, placement, mib, most_rows);
    }
  };
  for (const Placement& placement : {kPlacements[0], kPlacements[1], kPlacements[2], Placement{3, 256}}) {
    for (int mib : kTensorMiB) all(placement, mib, 0);
  }
  // Time per wave against rows, as the planner counts it.
  for (int most_rows : {2, 4, 8, 16, 28}) all({2, 256}, kTensorMiB[4], most_rows);
}

}  // namespace device_limits
