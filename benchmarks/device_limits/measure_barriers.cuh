// Part "barriers": what blocks pay to wait for each other, and to exchange sums, while the whole device does the same.
#pragma once

#include "barriers.cuh"
#include "gpu.cuh"

namespace device_limits {

constexpr int kClusterSizes[] = {2, 4, 8, 16};  // 16: not on every device
constexpr int kGridTeams[] = {2, 8, 16, 32, 64};

// Blocks that fill the device, and how they are placed.
struct Placement {
  int blocks_per_sm;
  int threads;

  // So much shared memory that no more blocks than these fit.
  size_t shared_bytes(const Gpu& gpu) const { return gpu.shared_bytes / blocks_per_sm - gpu.reserved_shared_bytes; }
};
constexpr Placement kPlacements[] = {{1, 512}, {2, 256}, {2, 512}};

inline Line barrier_line(const char* what, const Placement& placement, int team) {
  return Line("barriers")
      .add("what", what)
      .add("team", team)
      .add("blocks_per_sm", placement.blocks_per_sm)
      .add("threads", placement.threads);
}

// How many clusters of this kernel the device has room for, after what 16 blocks need has been asked for.
template <typename... Parameters>
int64_t clusters_at_a_time(void (*kernel)(Parameters...), const bn_ext::cuda::Grid& grid) {
  check(bn_ext::cuda::ask_for_shared_memory(kernel), "shared memory");
  if (grid.cluster_blocks > bn_ext::cuda::kMaxClusterBlocks) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "a larger cluster");
  }
  int clusters = 0;
  const bn_ext::cuda::LaunchConfig config(grid, nullptr);
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get()), "the number of clusters");
  if (clusters == 0) throw Failure("no such cluster fits");
  return clusters;
}

// The same of teams of a grid, or of any blocks.
inline int64_t teams_at_a_time(const Gpu& gpu, const Placement& placement, int team) {
  const int teams = gpu.multiprocessors * placement.blocks_per_sm / team;
  if (teams == 0) throw Failure("no such team fits");
  return teams;
}

// Microseconds of a round: run(rounds) launches them, prepare() comes before that.
template <typename Prepare, typename Run>
void add_round(Gpu& gpu, Line& line, const Prepare& prepare, const Run& run) {
  const Timing few = gpu.time(1, [&] { run(kFewRounds); }, prepare);
  const Timing many = gpu.time(1, [&] { run(kManyRounds); }, prepare);
  const double rounds = kManyRounds - kFewRounds;
  line << Timing{(many.median - few.median) / rounds, (many.best - few.best) / rounds};
}

template <Barrier kBarrier>
void measure_barrier(Gpu& gpu, const char* what, const Placement& placement, int team, int sleep_ns = 20) {
  constexpr bool kOfGrid = kBarrier == Barrier::kCounter || kBarrier == Barrier::kCooperative;
  constexpr bool kOfCluster = kBarrier == Barrier::kCluster || kBarrier == Barrier::kOneFence;
  Line line = barrier_line(what, placement, team);
  if (kBarrier == Barrier::kCounter) line.add("sleep_ns", sleep_ns);
  gpu.figure(std::move(line), [&](Line& line) {
    bn_ext::cuda::Grid grid = {team, placement.threads, placement.shared_bytes(gpu)};
    if (kOfCluster) grid.cluster_blocks = team;
    grid.cooperative = kOfGrid;
    const int64_t teams =
        kOfCluster ? clusters_at_a_time(barrier_kernel<kBarrier>, grid) : teams_at_a_time(gpu, placement, team);
    grid.blocks = teams * team;
    unsigned* counters = gpu.sums;
    unsigned* progress = counters + teams * kCounterWords;
    const Rounds all = {0, team, sleep_ns, counters, progress, gpu.words};
    gpu.clear(gpu.words, sizeof(unsigned));
    const auto prepare = [&] { gpu.clear(gpu.sums, (teams * kCounterWords + grid.blocks) * sizeof(unsigned)); };
    add_round(gpu, line, prepare, [&](int rounds) {
      Rounds some = all;
      some.rounds = rounds;
      gpu.launch(barrier_kernel<kBarrier>, grid, some);
    });
    if (gpu.fetch(gpu.words, 1)[0] != 0) throw Failure("a block has not waited for its neighbour");
    for (unsigned round : gpu.fetch(progress, grid.blocks)) {
      if (round != kManyRounds - 1) throw Failure("a block has not come to its last round");
    }
    line.add("blocks", grid.blocks);
  });
}

// What exchange_kernel must find: the keys that all blocks have looked at.
inline unsigned sum_of_keys(const TeamShape& shape, int rounds) {
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int place = 0; place < shape.channels; ++place) {
      unsigned words = 0;
      for (int segment = 0; segment < shape.blocks; ++segment) words += left_sum(round, segment, place);
      sum += key_of(words, shape.blocks);
    }
  }
  return sum * static_cast<unsigned>(shape.blocks * shape.teams);
}

inline void measure_exchange(Gpu& gpu, Team kind, const char* what, const Placement& placement, int team) {
  for (int channels : {1, 8, 64}) {
    gpu.figure(barrier_line(what, placement, team).add("channels", channels), [&](Line& line) {
      bn_ext::cuda::Grid grid = {team, placement.threads, placement.shared_bytes(gpu)};
      grid.cluster_blocks = kind == Team::kCluster ? team : 1;
      grid.cooperative = kind == Team::kGrid;
      const int64_t teams =
          kind == Team::kCluster ? clusters_at_a_time(exchange_kernel, grid) : teams_at_a_time(gpu, placement, team);
      const TeamShape shape = {kind, team, teams, teams, placement.threads, 1, channels};
      const Plan plan = plan_of(shape);
      grid.blocks = plan.blocks();
      gpu.clear(gpu.target, counter_bytes(plan));
      const auto run = [&](int rounds) {
        gpu.launch(exchange_kernel, grid, plan, rounds, gpu.sums, workspace_at(gpu.target, plan));
      };
      add_round(gpu, line, [] {}, run);
      gpu.check_sums(grid.blocks * placement.threads / bn_ext::cuda::kWarpThreads, sum_of_keys(shape, kManyRounds));
      line.add("blocks", grid.blocks);
    });
  }
}

inline void measure_barriers(Gpu& gpu) {
  for (const Placement& placement : kPlacements) {
    const int room = gpu.multiprocessors * placement.blocks_per_sm;
    measure_barrier<Barrier::kBlock>(gpu, "block barrier", placement, 1);
    for (int team : kClusterSizes) {
      if (!gpu.has_clusters()) break;
      measure_barrier<Barrier::kCluster>(gpu, "cluster barrier", placement, team);
      measure_barrier<Barrier::kOneFence>(gpu, "cluster barrier, one fence", placement, team);
    }
    for (int team : kGridTeams) measure_barrier<Barrier::kCounter>(gpu, "counter barrier", placement, team);
    measure_barrier<Barrier::kCounter>(gpu, "counter barrier", placement, room);
    measure_barrier<Barrier::kCounter>(gpu, "counter barrier", placement, 32, kNoSleep);
    measure_barrier<Barrier::kCounter>(gpu, "counter barrier", placement, room, kNoSleep);
    measure_barrier<Barrier::kCooperative>(gpu, "grid.sync()", placement, room);
  }
  for (const Placement& placement : {kPlacements[0], kPlacements[1]}) {
    measure_exchange(gpu, Team::kBlock, "exchange in a block", placement, 1);
    for (int team : kClusterSizes) {
      if (gpu.has_clusters() && team <= bn_ext::cuda::kMaxClusterBlocks) {
        measure_exchange(gpu, Team::kCluster, "exchange in a cluster", placement, team);
      }
    }
    for (int team : kGridTeams) measure_exchange(gpu, Team::kGrid, "exchange in a grid's team", placement, team);
  }
}

}  // namespace device_limits
