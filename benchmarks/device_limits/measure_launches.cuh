// Part "launches": what launches and questions to CUDA cost, what early starts save, what a change of the split between
// L1 cache and shared memory costs, and how many blocks and clusters are resident at a time.
#pragma once

#include "gpu.cuh"
#include "measure_resident.cuh"

namespace device_limits {

constexpr int64_t kLaunches = std::min(200, 16 * kMostCalls);

inline __device__ unsigned own_multiprocessor() {
  unsigned number = 0;
#ifdef __CUDACC__
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
#endif
  return number;
}

// Does nothing, after what the package's kernels do first.
__global__ void empty_kernel() { bn_ext::cuda::pdl_wait(); }

// Most blocks of this grid that were on each multiprocessor at a time: most[i] of the i-th one. `here` is zero. Each
// block stays for so many cycles. Any grid; moves next to nothing.
__global__ void residents_kernel(unsigned* here, unsigned* most, int64_t cycles) {
  if (threadIdx.x != 0) return;
  const unsigned multiprocessor = own_multiprocessor();
  atomicMax(most + multiprocessor, atomicAdd(here + multiprocessor, 1u) + 1);
  for (const int64_t begin = clock64(); clock64() - begin < cycles;) __nanosleep(1000);
  atomicSub(here + multiprocessor, 1u);
}

// y = x. kTriggers: says at its start that the kernel behind it may start; else that is when its blocks are done. Any
// grid, whose blocks take turns at neighbouring vectors. Reads x and writes y once.
template <bool kTriggers>
__global__ void __launch_bounds__(kThreads) chain_kernel(const uint4* x, uint4* y, int64_t vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (kTriggers) cudaTriggerProgrammaticLaunchCompletion();
#endif
  bn_ext::cuda::pdl_wait();
  for (int64_t i = global_thread(); i < vectors; i += int64_t(gridDim.x) * kThreads) __stwb(y + i, __ldcg(x + i));
}

// A launch that may start early, whether it is captured or not: the package's own is an ordinary one when captured.
template <typename... Parameters, typename... Arguments>
void launch_early(Gpu& gpu, void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = gpu.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "an early launch");
}

// Launches of empty kernels, one behind the other: microseconds of the device and of the host each.
template <typename Launch>
void measure_empty(Gpu& gpu, const char* what, const Launch& launch) {
  const auto all = [&] {
    for (int i = 0; i < kLaunches; ++i) launch();
  };
  gpu.figure(Line("launches").add("table", "empty").add("what", what).add("by", "stream"), [&](Line& line) {
    std::vector<double> of_host;
    line << gpu.time(kLaunches, [&] {
      const double begin = seconds_now();
      all();
      of_host.push_back((seconds_now() - begin) * 1e6 / kLaunches);
    });
    line.add("host_us", timing_of(of_host).median);
  });
  gpu.figure(Line("launches").add("table", "empty").add("what", what).add("by", "graph"),
             [&](Line& line) { line << gpu.time_in_graph(kLaunches, [&](int64_t) { launch(); }); });
}

inline void measure_empties(Gpu& gpu) {
  const int64_t blocks = gpu.multiprocessors * 2 / 8 * 8;
  const size_t shared_bytes = Placement{2, kThreads}.shared_bytes(gpu);
  const auto ordinary = [&](const bn_ext::cuda::Grid& grid) {
    return [&gpu, grid] { gpu.launch(empty_kernel, grid); };
  };
  measure_empty(gpu, "one block", ordinary({1, kThreads}));
  measure_empty(gpu, "two blocks per multiprocessor", ordinary({blocks, kThreads}));
  measure_empty(gpu, "and half its shared memory each", ordinary({blocks, kThreads, shared_bytes}));
  measure_empty(gpu, "cooperative", ordinary({blocks, kThreads, shared_bytes, 1, true}));
  if (!gpu.has_clusters()) return;
  for (int cluster : {2, 4, 8}) {
    const std::string what = "clusters of " + std::to_string(cluster);
    measure_empty(gpu, what.c_str(), ordinary({blocks, kThreads, shared_bytes, cluster}));
  }
  measure_empty(gpu, "early start, one block", [&] { launch_early(gpu, empty_kernel, 1); });
  measure_empty(gpu, "early start, two blocks each", [&] { launch_early(gpu, empty_kernel, blocks); });
}

// Copies of so many KiB, each of what the one before has written.
template <typename Launch>
void measure_chain(Gpu& gpu, const char* starts, int kib, const Launch& launch) {
  const int64_t bytes = kib * kMiB / 1024, vectors = bytes / kVectorBytes;
  const int64_t calls = calls_over_pool(vectors);
  const int64_t blocks =
      std::clamp<int64_t>(vectors / (kThreads * 4), 1, gpu.multiprocessors * bn_ext::cuda::kBlocksAtATime);
  const auto call = [&](int64_t i) {
    launch(blocks, i == 0 ? gpu.source : gpu.target + (i - 1) * vectors, gpu.target + i * vectors, vectors);
  };
  const auto all = [&] {
    for (int64_t i = 0; i < calls; ++i) call(i);
  };
  for (const char* by : {"stream", "graph"}) {
    Line line("launches");
    line.add("table", "chains").add("starts", starts).add("by", by).add("kib", kib);
    gpu.figure(std::move(line), [&](Line& line) {
      const bool in_graph = by[0] == 'g';
      gpu.clear(gpu.target, calls * bytes);
      in_graph ? Graph(gpu.stream, all).launch() : all();
      gpu.check_target(vectors, {}, (calls - 1) * vectors);  // before it holds what it is to hold anyway
      line << (in_graph ? gpu.time_in_graph(calls, call) : gpu.time(calls, all));
    });
  }
}

inline void measure_chains(Gpu& gpu) {
  for (int kib : {16, 64, 256, 1024, 2048, 4096, 8192, 16384, 65536}) {
    measure_chain(gpu, "usual", kib, [&](int64_t blocks, const uint4* x, uint4* y, int64_t vectors) {
      gpu.launch(chain_kernel<false>, {blocks, kThreads}, x, y, vectors);
    });
    if (!gpu.has_clusters()) continue;
    measure_chain(gpu, "early", kib, [&](int64_t blocks, const uint4* x, uint4* y, int64_t vectors) {
      launch_early(gpu, chain_kernel<false>, blocks, x, y, vectors);
    });
    measure_chain(gpu, "earliest", kib, [&](int64_t blocks, const uint4* x, uint4* y, int64_t vectors) {
      launch_early(gpu, chain_kernel<true>, blocks, x, y, vectors);
    });
  }
}

// A chain of copies of so many MiB each, in turns by the first kind of kernel and by the second: through shared memory,
// which takes all of a multiprocessor's, or without any. Between the kinds each multiprocessor must change its split
// between L1 cache and shared memory, which it does when it is idle.
inline void measure_turns(Gpu& gpu, const char* what, bool first_is_resident, bool second_is_resident, int mib) {
  Line line("launches");
  line.add("table", "turns").add("what", what).add("mib", mib);
  gpu.figure(std::move(line), [&](Line& line) {
    const ResidentCopy copy(gpu, kSchedules[0], {2, kThreads}, mib, 0);
    const Plan plan = plan_of(copy.shape);
    const int64_t slice_vectors = plan.slice_width / plan.vector, vectors = slice_vectors * plan.slices;
    const int64_t calls = calls_over_pool(vectors) / 2 * 2;
    const auto is_resident = [&](int64_t i) { return i % 2 == 0 ? first_is_resident : second_is_resident; };
    const auto call = [&](int64_t i) {
      const uint4* const x = gpu.source + i * vectors;
      uint4* const y = gpu.target + i * vectors;
      if (!is_resident(i)) return gpu.launch(chain_kernel<false>, {copy.grid.blocks, kThreads}, x, y, vectors);
      gpu.launch(resident_copy_kernel,
                 copy.grid,
                 plan,
                 reinterpret_cast<const unsigned*>(x),
                 reinterpret_cast<unsigned*>(y),
                 workspace_at(gpu.sums, plan));
    };
    gpu.clear(gpu.target, kPoolBytes);
    call(1);  // loads the second kernel before a capture, as the graph does with the first
    const Timing timing = gpu.time_in_graph(calls, call);

    std::vector<unsigned> keys;  // none, where a kernel copies without any
    for (int64_t i = 0; i < calls * plan.slices; ++i) {
      const unsigned words = gpu.sum_of_source(i * slice_vectors, slice_vectors);
      keys.push_back(is_resident(i / plan.slices) ? key_of(words, 1) : 0);
    }
    check(cudaMemcpy(gpu.sums, keys.data(), keys.size() * sizeof(unsigned), cudaMemcpyHostToDevice), "keys");
    gpu.check_target(calls * vectors, {0, gpu.sums, slice_vectors});
    line.add("bytes", 2 * vectors * kVectorBytes) << timing;
  });
}

inline void measure_all_turns(Gpu& gpu) {
  for (int mib : {2, 13, 51}) {
    measure_turns(gpu, "copy, copy", false, false, mib);
    measure_turns(gpu, "resident, resident", true, true, mib);
    measure_turns(gpu, "copy, resident", false, true, mib);
  }
}

// A question to CUDA: microseconds of the host.
template <typename Ask>
void measure_question(Gpu& gpu, const char* what, const Ask& ask) {
  gpu.figure(Line("launches").add("table", "calls").add("what", what), [&](Line& line) {
    std::vector<double> samples;
    for (int i = 0; i < kWarmUps + kSamples; ++i) {
      const double begin = seconds_now();
      for (int call = 0; call < kLaunches; ++call) check(ask(), what);
      if (i >= kWarmUps) samples.push_back((seconds_now() - begin) * 1e6 / kLaunches);
    }
    line << timing_of(std::move(samples));
  });
}

// Those that the package asks about a kernel before it launches it.
inline void measure_questions(Gpu& gpu) {
  const Placement placement = {2, kThreads};
  const size_t shared_bytes = placement.shared_bytes(gpu);
  check(bn_ext::cuda::ask_for_shared_memory(resident_copy_kernel), "shared memory");
  int found = 0, most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory of a block");
  measure_question(gpu, "cudaFuncSetAttribute", [&] {  // to the value that it has: others rely on it
    return cudaFuncSetAttribute(resident_copy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  });
  measure_question(gpu, "cudaOccupancyMaxActiveBlocksPerMultiprocessor", [&] {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, resident_copy_kernel, kThreads, shared_bytes);
  });
  if (!gpu.has_clusters()) return;
  for (int cluster : {2, 8}) {
    const std::string what = "cudaOccupancyMaxActiveClusters, clusters of " + std::to_string(cluster);
    const bn_ext::cuda::LaunchConfig config({cluster, kThreads, shared_bytes, cluster}, nullptr);
    measure_question(
        gpu, what.c_str(), [&] { return cudaOccupancyMaxActiveClusters(&found, resident_copy_kernel, config.get()); });
  }
}

// How many blocks are on a multiprocessor together: by CUDA's word, and as blocks have seen it.
inline void measure_residents(Gpu& gpu, const Placement& placement, int carveout) {
  Line line("launches");
  line.add("table", "residents").add("wanted", placement.blocks_per_sm).add("threads", placement.threads);
  line.add("shared_bytes", int64_t(placement.shared_bytes(gpu))).add("carveout", carveout);
  gpu.figure(std::move(line), [&](Line& line) {
    const size_t shared_bytes = placement.shared_bytes(gpu);
    check(bn_ext::cuda::ask_for_shared_memory(residents_kernel), "shared memory");
    check(cudaFuncSetAttribute(residents_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout),
          "carve-out");
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, residents_kernel, placement.threads, shared_bytes),
          "occupancy");
    constexpr int kMost = 1024;  // more than the number of any multiprocessor
    gpu.clear(gpu.sums, 2 * kMost * sizeof(unsigned));
    const int64_t grid = gpu.multiprocessors * placement.blocks_per_sm;
    gpu.launch(residents_kernel, {grid, placement.threads, shared_bytes}, gpu.sums, gpu.sums + kMost, int64_t(200000));
    int seen = 0;  // multiprocessors with as many as wanted
    for (unsigned most : gpu.fetch(gpu.sums + kMost, kMost)) seen += most == unsigned(placement.blocks_per_sm);
    line.add("blocks", blocks).add("multiprocessors_seen", seen);
  });
}

inline void count_clusters(Gpu& gpu, const Placement& placement, int cluster) {
  Line line("launches");
  line.add("table", "clusters").add("cluster", cluster).add("blocks_per_sm", placement.blocks_per_sm);
  line.add("threads", placement.threads).add("shared_bytes", int64_t(placement.shared_bytes(gpu)));
  gpu.figure(std::move(line), [&](Line& line) {
    const bn_ext::cuda::Grid grid = {cluster, placement.threads, placement.shared_bytes(gpu), cluster};
    line.add("clusters", clusters_at_a_time(barrier_kernel<Barrier::kCluster>, grid));
  });
}

inline void measure_launches(Gpu& gpu) {
  for (const Placement& placement : {Placement{1, 512}, Placement{2, 256}, Placement{2, 512}, Placement{3, 256}}) {
    for (int carveout : {-1, 100, 50, 0}) measure_residents(gpu, placement, carveout);
  }
  for (const Placement& placement : {kPlacements[0], kPlacements[1]}) {
    for (int cluster : {2, 3, 4, 5, 6, 7, 8, 16}) {
      if (gpu.has_clusters()) count_clusters(gpu, placement, cluster);
    }
  }
  measure_empties(gpu);
  measure_chains(gpu);
  measure_all_turns(gpu);
  measure_questions(gpu);
}

}  // namespace device_limits
