// What all measurements share: the device, memory, time, errors, and the lines that the program prints.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "random_data.cuh"

namespace device_limits {

#ifdef __CUDACC__
constexpr int64_t kMiB = 1 << 20;
constexpr int kWarmUps = 2, kSamples = 11;
constexpr int kBurst = 4;                          // launches between two events, of what takes long
constexpr int kMostCalls = 128, kReplays = 2;      // in a graph, and of it between two events
constexpr int kFewRounds = 50, kManyRounds = 550;  // of barriers; the difference is without the launch
constexpr int kNoSleep = 0;
#else  // tests/cuda_on_cpu, where time has no meaning
constexpr int64_t kMiB = 1 << 11;
constexpr int kWarmUps = 0, kSamples = 1;
constexpr int kBurst = 1;
constexpr int kMostCalls = 2, kReplays = 1;
constexpr int kFewRounds = 2, kManyRounds = 4;
constexpr int kNoSleep = 1;  // who looks at a counter without any would look for ever
#endif
constexpr int64_t kPoolBytes = 1024 * kMiB;  // what is read at most, and as much again to write to: many times L2
constexpr int64_t kPoolVectors = kPoolBytes / 16;
constexpr int64_t kSumBytes = 64 * kMiB;
constexpr int64_t kSumVectors = 256;  // between two of the sums that the host keeps of the pool

struct Failure : std::runtime_error {  // of one figure
  using std::runtime_error::runtime_error;
};
struct OutOfTime {};  // for this part
struct Lost {};       // the device does not go on after what has failed

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next figure does not find it
  throw Failure(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// A line of output: a JSON object.
class Line {
 public:
  explicit Line(const char* part) { add("part", part); }
  Line& add(const char* name, const std::string& text) {
    std::string escaped;
    for (char c : text) {
      if (c == '"' || c == '\\') escaped += '\\';
      escaped += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return raw(name, '"' + escaped + '"');
  }
  Line& add(const char* name, const char* text) { return add(name, std::string(text)); }
  Line& add(const char* name, double number) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.9g", number);
    return raw(name, text);
  }
  Line& add(const char* name, int64_t number) { return raw(name, std::to_string(number)); }
  Line& add(const char* name, int number) { return add(name, int64_t(number)); }
  Line& add(const char* name, bool yes) { return raw(name, yes ? "true" : "false"); }
  void print() const {
    std::printf("%s}\n", text_.c_str());
    std::fflush(stdout);  // what is known stays known, whatever comes
  }

 private:
  Line& raw(const char* name, const std::string& value) {
    text_ += (text_.empty() ? "{\"" : ", \"") + std::string(name) + "\": " + value;
    return *this;
  }
  std::string text_;
};

struct Timing {  // of one call, microseconds
  double median;
  double best;
};

// How many calls go over the pool once: then what one of them finds in a cache is not what it reads.
constexpr int64_t calls_over_pool(int64_t vectors) { return std::min<int64_t>(kMostCalls, kPoolVectors / vectors); }

inline Timing timing_of(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.front()};
}

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Calls on a stream, captured once and replayed.
class Graph {
 public:
  template <typename Body>
  Graph(cudaStream_t stream, const Body& body) : stream_(stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    std::string wrong;
    try {
      body();
    } catch (const Failure& failure) {
      wrong = failure.what();
    }
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(stream, &graph);  // in any case
    if (!wrong.empty()) throw Failure("in a capture, " + wrong);
    check(error, "end of capture");
    const cudaError_t made = cudaGraphInstantiate(&replay_, graph, 0);
    (void)cudaGraphDestroy(graph);
    check(made, "making a graph");
  }
  ~Graph() {
    if (replay_ == nullptr) return;
    (void)cudaStreamSynchronize(stream_);
    (void)cudaGraphExecDestroy(replay_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const { check(cudaGraphLaunch(replay_, stream_), "a graph's launch"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t replay_ = nullptr;
};

// The device and its memory: `source` holds random_vector(0), random_vector(1) ...
class Gpu {
 public:
  cudaStream_t stream = nullptr;
  uint4* source = nullptr;    // kPoolBytes
  uint4* target = nullptr;    // the same
  unsigned* sums = nullptr;   // kSumBytes, for whatever kernels leave
  unsigned* words = nullptr;  // some words for checks
  int major = 0;              // of the compute capability
  int minor = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;           // of a multiprocessor
  int reserved_shared_bytes = 0;  // of each block, by CUDA

  Gpu() {
    check(cudaSetDevice(0), "the device");
    check(cudaStreamCreate(&stream), "a stream");
    check(cudaEventCreate(&begin_), "an event");
    check(cudaEventCreate(&end_), "an event");
    major = ask(cudaDevAttrComputeCapabilityMajor);
    minor = ask(cudaDevAttrComputeCapabilityMinor);
    multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    reserved_shared_bytes = ask(cudaDevAttrReservedSharedMemoryPerBlock);
    check(cudaMalloc(&source, kPoolBytes), "memory to read");
    check(cudaMalloc(&target, kPoolBytes), "memory to write");
    check(cudaMalloc(&sums, kSumBytes), "memory for sums");
    check(cudaMalloc(&words, 128), "memory for checks");
    launch(fill_kernel, {multiprocessors * 8, 256}, source, kPoolVectors);
    sums_before_.resize(kPoolVectors / kSumVectors + 1, 0);
    for (int64_t i = 0; i < kPoolVectors; ++i) {
      if (i % kSumVectors == 0) sums_before_[i / kSumVectors + 1] = sums_before_[i / kSumVectors];
      sums_before_[i / kSumVectors + 1] += sum_of(random_vector(i));
    }
  }

  template <typename Attribute>
  static int ask(Attribute attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, 0), "a device attribute");
    return value;
  }
  bool has_clusters() const { return major >= 9; }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const bn_ext::cuda::Grid& grid, Arguments&&... arguments) {
    check(bn_ext::cuda::launch(kernel, grid, stream, std::forward<Arguments>(arguments)...), "a launch");
  }
  void wait() { check(cudaStreamSynchronize(stream), "what runs on the device"); }
  void clear(void* memory, int64_t bytes) { check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync"); }
  template <typename T>
  std::vector<T> fetch(const T* from, int64_t count) {
    std::vector<T> values(count);
    wait();
    check(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "a copy to the host");
    return values;
  }

  // Microseconds that each of `calls` in one run of body() takes. prepare() comes before each run and is not counted.
  template <typename Body, typename Prepare>
  Timing time(int64_t calls, const Body& body, const Prepare& prepare) {
    std::vector<double> samples;
    for (int i = 0; i < kWarmUps + kSamples; ++i) {
      prepare();
      check(cudaEventRecord(begin_, stream), "an event");
      body();
      check(cudaEventRecord(end_, stream), "an event");
      wait();
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin_, end_), "the time between events");
      if (i >= kWarmUps) samples.push_back(ms * 1e3 / double(calls));
    }
    return timing_of(std::move(samples));
  }
  template <typename Body>
  Timing time(int64_t calls, const Body& body) {
    return time(calls, body, [] {});
  }
  // The same for call(0) ... call(calls - 1) in a graph, so that launches take no time of the host's.
  template <typename Call>
  Timing time_in_graph(int64_t calls, const Call& call) {
    call(0);  // CUDA loads a kernel when it is first launched, which had better not be in a capture
    wait();
    const Graph graph(stream, [&] {
      for (int64_t i = 0; i < calls; ++i) call(i);
    });
    return time(kReplays * calls, [&] {
      for (int i = 0; i < kReplays; ++i) graph.launch();
    });
  }

  // The sum of the source's words in [first, first + vectors), both multiples of kSumVectors.
  unsigned sum_of_source(int64_t first, int64_t vectors) const {
    return sums_before_[(first + vectors) / kSumVectors] - sums_before_[first / kSumVectors];
  }
  void check_sums(int64_t count, unsigned expected) {
    unsigned sum = 0;
    for (unsigned word : fetch(sums, count)) sum += word;
    if (sum != expected) {
      throw Failure("wrong checksum: " + std::to_string(expected) + " expected, " + std::to_string(sum) + " found");
    }
  }
  // Of the target, so many vectors from `first` on.
  void check_target(int64_t vectors, const Expected& expected = {}, int64_t first = 0) {
    clear(words, sizeof(unsigned));
    launch(count_wrong_kernel, {multiprocessors * 8, 256}, target + first, vectors, expected, words);
    const unsigned wrong = fetch(words, 1)[0];
    if (wrong == 0) return;
    throw Failure("wrong result: " + std::to_string(wrong) + " of " + std::to_string(vectors) + " vectors");
  }

  // Prints the line when measure(line) has added to it, or why that could not be.
  template <typename Measure>
  void figure(Line line, const Measure& measure) {
    if (seconds_now() > deadline) throw OutOfTime{};
    try {
      measure(line);
    } catch (const Failure& failure) {
      line.add("error", failure.what());
    }
    line.print();
    if (cudaStreamSynchronize(stream) != cudaSuccess) throw Lost{};
  }

  double deadline = 0;  // of the part

 private:
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::vector<unsigned> sums_before_;
};

inline Line& operator<<(Line& line, const Timing& timing) {
  return line.add("us", timing.median).add("best_us", timing.best);
}

}  // namespace device_limits
