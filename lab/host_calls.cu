// Item 6: what the host's calls of CUDA cost that a pass without a plan cache makes, in microseconds. Medians of 5
// loops of 200 calls; a JSON line each.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kLoops = 5, kCalls = 200;
constexpr int kThreads = 256, kSharedBytes = 100 * 1024;

struct Parameters {
  char bytes[450];  // about as many as a pass has
};

__global__ void __launch_bounds__(kThreads) empty_kernel(const Parameters) {}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "host_calls: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename Call>
void measure(const char* what, const Call& call) {
  double microseconds[kLoops];
  check(call(), what);
  for (double& time : microseconds) {
    check(cudaDeviceSynchronize(), what);
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) check(call(), what);
    time = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / kCalls;
  }
  check(cudaDeviceSynchronize(), what);
  std::sort(microseconds, microseconds + kLoops);
  std::printf("{\"quantity\": \"%s\", \"value\": %.3f, \"unit\": \"us\"}\n", what, microseconds[kLoops / 2]);
  std::fflush(stdout);
}

struct Launch {
  Launch(int blocks, cudaStream_t stream, cudaLaunchAttributeID id = cudaLaunchAttributeIgnore) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = id != cudaLaunchAttributeIgnore;
    attribute.id = id;
    if (id == cudaLaunchAttributeClusterDimension) attribute.val.clusterDim = {8, 1, 1};
    if (id == cudaLaunchAttributeCooperative) attribute.val.cooperative = 1;
  }
  Launch(const Launch&) = delete;

  cudaError_t operator()() const { return cudaLaunchKernelEx(&config, empty_kernel, Parameters{}); }

  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
};

cudaError_t set_attribute() {
  return cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

}  // namespace

int main() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  int device = 0, multiprocessors = 0;
  const Launch plain(64, stream), of_clusters(64, stream, cudaLaunchAttributeClusterDimension);
  const Launch cooperative(64, stream, cudaLaunchAttributeCooperative);
  const auto ask_device = [&] {
    const cudaError_t error = cudaGetDevice(&device);
    return error != cudaSuccess ? error
                                : cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  };
  check(set_attribute(), "an attribute");
  measure("set attribute", set_attribute);
  measure("ask whether a grid fits", [&] {
    int blocks = 0;
    cudaError_t error = ask_device();
    if (error == cudaSuccess) error = set_attribute();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, kThreads, kSharedBytes);
  });
  measure("ask whether a cluster fits", [&] {
    int clusters = 0;
    cudaError_t error = ask_device();
    if (error == cudaSuccess) error = set_attribute();
    return error != cudaSuccess ? error : cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &of_clusters.config);
  });
  measure("set attribute, ask for a capture", [&] {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = set_attribute();
    return error != cudaSuccess ? error : cudaStreamIsCapturing(stream, &status);
  });
  measure("launch", plain);
  measure("launch of clusters", of_clusters);
  measure("cooperative launch", cooperative);
}
