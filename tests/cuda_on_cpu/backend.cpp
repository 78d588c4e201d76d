// Takes the place of csrc/cpu/batch_norm_cpu.cpp in a build for tests (run_suite.py): CPU tensors go to the CUDA
// kernels, on the simulated device. Each pass has another order of threads, and memory aligned as the tensor's.
#include <ATen/Functions.h>

#include <cstring>
#include <mutex>
#include <vector>

#include "../../csrc/cpu/batch_norm_cpu.h"
#include "../../csrc/cuda/kernels.h"
#include "cuda_on_cpu.h"

namespace bn_ext::cpu {
namespace {

using cuda_on_cpu::Contents;
using cuda_on_cpu::Kind;

// With so little shared memory that small slices stay on chip, those of larger tensors in part, and others do not.
constexpr cuda::Machine kMachine = {2, 24 * 1024, true, true, true};

size_t bytes_of(DType dtype, int64_t count) {
  const size_t sizes[] = {4, 8, 2, 2};
  return sizes[static_cast<int>(dtype)] * count;
}

// One pass on the device, which serves one thread at a time.
class Pass {
 public:
  Pass() : lock_(mutex()) {
    static uint64_t seed = 0;
    cuda_on_cpu::reset();
    const int blocks = kMachine.multiprocessors * cuda::kResidentAtATime;
    cuda_on_cpu::set_machine({blocks, 48 * 1024, kMachine.multiprocessors});
    cuda_on_cpu::set_order({seed, static_cast<cuda_on_cpu::Policy>(seed % 4)});
    ++seed;
  }

  // Both make `pointer` one to memory of the device; null stays null.
  template <typename T>
  void input(const char* name, T*& pointer, size_t bytes) {
    if (pointer == nullptr) return;
    pointer = static_cast<T*>(add(name, pointer, bytes, Contents::copied));
  }
  template <typename T>
  void output(const char* name, T*& pointer, size_t bytes, Contents contents = Contents::poison) {
    if (pointer == nullptr) return;
    T* host = pointer;
    pointer = static_cast<T*>(add(name, pointer, bytes, contents));
    outputs_.push_back({const_cast<void*>(static_cast<const void*>(host)), pointer, bytes});
  }

  cuda::Workspace workspace(size_t bytes, const cuda::Plan& plan) {
    const size_t counted = counter_bytes(plan);
    void* memory = nullptr;
    if (bytes > 0) {
      at::empty({static_cast<int64_t>(bytes)}, at::kByte);  // as the real one is torch's, and a test may let that fail
      memory = cuda_on_cpu::add_buffer({"workspace", Kind::workspace, bytes});
    }
    void* counters =
        counted == 0 ? nullptr : cuda_on_cpu::add_buffer({"counters", Kind::workspace, counted, 0, Contents::zero});
    return {memory, static_cast<cuda::TeamCounters*>(counters)};
  }

  void finish(cudaError_t error) {
    if (error != cudaSuccess) throw cuda_on_cpu::Fault(cudaGetErrorString(error));
    for (const Output& output : outputs_) std::memcpy(output.host, output.device, output.bytes);
  }

 private:
  struct Output {
    void* host;
    const void* device;
    size_t bytes;
  };

  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static void* add(const char* name, const void* host, size_t bytes, Contents contents) {
    return cuda_on_cpu::add_buffer(
        {name, Kind::activation, bytes, reinterpret_cast<uintptr_t>(host) % 256, contents, host});
  }

  std::lock_guard<std::mutex> lock_;
  std::vector<Output> outputs_;
};

DType statistics_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

}  // namespace

void forward(const ForwardParams& params) {
  Pass pass;
  ForwardParams p = params;
  const size_t activation = bytes_of(p.dtype, p.shape.numel());
  const size_t vector = bytes_of(p.params_dtype, p.shape.c);
  const size_t statistics = bytes_of(statistics_dtype(p.dtype), p.shape.c);
  pass.input("x", p.x, activation);
  pass.input("z", p.z, activation);
  pass.input("weight", p.weight, vector);
  pass.input("bias", p.bias, vector);
  pass.output("running_mean", p.running_mean, vector, Contents::copied);
  pass.output("running_var", p.running_var, vector, Contents::copied);
  pass.output("num_batches_tracked", p.num_batches_tracked, sizeof(int64_t), Contents::copied);
  pass.output("y", p.y, activation);
  pass.output("mask", p.mask, mask_bytes(p.shape.numel()));
  const Contents contents = p.recompute ? Contents::copied : Contents::poison;
  pass.output("mean", p.mean, statistics, contents);
  pass.output("rstd", p.rstd, statistics, contents);
  pass.output("scale", p.scale, statistics, contents);
  pass.output("offset", p.offset, statistics, contents);
  cuda::Plan plan = cuda::choose_plan(p, kMachine);
  pass.finish(cuda::launch_or_do_without_teams(p, kMachine, plan, [&](const cuda::Plan& chosen) {
    return cuda::launch_forward(p, chosen, pass.workspace(cuda::forward_workspace_bytes(p, chosen), chosen), nullptr);
  }));
}

void backward(const BackwardParams& params) {
  Pass pass;
  BackwardParams p = params;
  const size_t activation = bytes_of(p.dtype, p.shape.numel());
  const size_t vector = bytes_of(p.params_dtype, p.shape.c);
  const size_t statistics = bytes_of(statistics_dtype(p.dtype), p.shape.c);
  pass.input("dy", p.dy, p.dy_is_scalar ? bytes_of(p.dtype, 1) : activation);
  pass.input("x", p.x, activation);
  pass.input("z", p.z, activation);
  pass.input("mask", p.mask, mask_bytes(p.shape.numel()));
  pass.input("mean", p.mean, statistics);
  pass.input("rstd", p.rstd, statistics);
  pass.input("scale", p.scale, statistics);
  pass.input("offset", p.offset, statistics);
  pass.output("dx", p.dx, activation);
  pass.output("dz", p.dz, activation);
  pass.output("dweight", p.dweight, vector);
  pass.output("dbias", p.dbias, vector);
  cuda::Plan plan = cuda::choose_plan(p, kMachine);
  pass.finish(cuda::launch_or_do_without_teams(p, kMachine, plan, [&](const cuda::Plan& chosen) {
    return cuda::launch_backward(p, chosen, pass.workspace(cuda::backward_workspace_bytes(p, chosen), chosen), nullptr);
  }));
}

}  // namespace bn_ext::cpu
