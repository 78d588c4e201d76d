// The package's kernels on the simulated device, for ctypes (batch_norm.py): plan, workspace, launches.
#include <cstring>
#include <vector>

#include "../../csrc/cuda/counters.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/plan_cache.h"
#include "../../csrc/cuda/plan_teams.h"
#include "../../csrc/cuda/traffic.h"
#include "c_api.h"
#include "cuda_on_cpu.h"

using namespace bn_ext;
using cuda_on_cpu::Fault;
using cuda_on_cpu::reported;

namespace {

// With a workspace for this pass, whose counters begin at zero and must end so.
template <typename Params>
cudaError_t launch(const Params& p,
                   const cuda::Plan& plan,
                   size_t (*bytes_of)(const Params&, const cuda::Plan&),
                   cudaError_t (*pass)(const Params&, const cuda::Plan&, const cuda::Workspace&, cudaStream_t)) {
  using cuda_on_cpu::add_buffer, cuda_on_cpu::Contents, cuda_on_cpu::Kind;
  const size_t bytes = bytes_of(p, plan), counted = counter_bytes(plan);
  cuda::Workspace workspace{};
  if (bytes > 0) workspace.memory = add_buffer({"workspace", Kind::workspace, bytes});
  if (counted > 0) {
    void* counters = add_buffer({"counters", Kind::workspace, counted, 0, Contents::zero});
    workspace.counters = static_cast<cuda::TeamCounters*>(counters);
  }
  const cudaError_t error = pass(p, plan, workspace, nullptr);
  const std::vector<unsigned char> zeros(counted);
  if (counted > 0 && std::memcmp(workspace.counters, zeros.data(), counted) != 0) {
    throw Fault("a pass has left counters of its teams that are not zero");
  }
  return error;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Fault(std::string("a launch failed: ") + cudaGetErrorString(error));
}

}  // namespace

extern "C" {

// So that batch_norm.py can tell whether its copies of the structs are the same.
int64_t batch_norm_sizes() {
  return int64_t(sizeof(ForwardParams)) << 32 | int64_t(sizeof(BackwardParams)) << 16 | int64_t(sizeof(cuda::Plan));
}

const char* batch_norm_make_plan(const cuda::Request* request, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] { *plan = cuda::make_plan(*request, *machine); });
}

const char* batch_norm_limit_teams(const char* largest, cuda::Machine* machine) {
  return reported([&] {
    if (!cuda::limit_teams(largest, *machine)) throw Fault("no such team");
  });
}

const char* batch_norm_choose_pdl(const char* choice, cuda::Machine* machine) {
  return reported([&] {
    if (!cuda::choose_pdl(choice, *machine)) throw Fault("neither 0 nor 1");
  });
}

const char* batch_norm_tune(const char* choices, cuda::Machine* machine) {
  return reported([&] {
    if (!cuda::tune(choices, *machine)) throw Fault("no such choice");
  });
}

const char* batch_norm_with_teams(int64_t team,
                                  int64_t segments,
                                  int64_t line,
                                  const cuda::Request* request,
                                  const cuda::Machine* machine,
                                  cuda::Plan* plan) {
  return reported([&] {
    const cuda::Plan layout = cuda::plan_with_slices(*request, int(line), *machine);
    *plan = cuda::with_teams(layout, cuda::Team(team), segments, *request, *machine);
  });
}

const char* batch_norm_time_of(const cuda::Plan* plan,
                               const cuda::Request* request,
                               const cuda::Machine* machine,
                               int64_t* time) {
  return reported([&] { *time = cuda::time_of(*plan, *request, *machine); });
}

// Of shared memory, for so many tensors in tiles.
const char* batch_norm_single_pass_bytes(const cuda::Plan* plan, int64_t tensors, int64_t value_bytes, int64_t* bytes) {
  return reported([&] { *bytes = int64_t(cuda::SinglePassMemory(*plan, int(tensors), size_t(value_bytes)).bytes); });
}

const char* batch_norm_plan_forward(const ForwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] { *plan = cuda::choose_plan(*p, *machine); });
}

const char* batch_norm_plan_backward(const BackwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] { *plan = cuda::choose_plan(*p, *machine); });
}

const char* batch_norm_traffic_forward(const ForwardParams* p, const cuda::Plan* plan, cuda::Traffic* traffic) {
  return reported([&] { *traffic = cuda::expected_traffic(*p, *plan); });
}

const char* batch_norm_traffic_backward(const BackwardParams* p, const cuda::Plan* plan, cuda::Traffic* traffic) {
  return reported([&] { *traffic = cuda::expected_traffic(*p, *plan); });
}

// The plan becomes the one that was launched.
const char* batch_norm_forward(const ForwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] {
    check(cuda::launch_or_do_without_teams(*p, *machine, *plan, [&](const cuda::Plan& chosen) {
      return launch(*p, chosen, cuda::forward_workspace_bytes, cuda::launch_forward);
    }));
  });
}

const char* batch_norm_backward(const BackwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] {
    check(cuda::launch_or_do_without_teams(*p, *machine, *plan, [&](const cuda::Plan& chosen) {
      return launch(*p, chosen, cuda::backward_workspace_bytes, cuda::launch_backward);
    }));
  });
}

// As the package launches passes: by the plan that this thread remembers, if there is one. The plan becomes the one
// that was launched.
const char* batch_norm_known_forward(const ForwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] {
    check(cuda::launch_by_known_plan(*p, *machine, 0, *plan, [&](const cuda::Plan& chosen) {
      return launch(*p, chosen, cuda::forward_workspace_bytes, cuda::launch_forward);
    }));
  });
}

const char* batch_norm_known_backward(const BackwardParams* p, const cuda::Machine* machine, cuda::Plan* plan) {
  return reported([&] {
    check(cuda::launch_by_known_plan(*p, *machine, 0, *plan, [&](const cuda::Plan& chosen) {
      return launch(*p, chosen, cuda::backward_workspace_bytes, cuda::launch_backward);
    }));
  });
}

// The counters of a stream, which is but a number here.
const char* batch_norm_zeros_of_stream(int64_t bytes, int64_t device, int64_t stream, void** memory) {
  return reported(
      [&] { *memory = cuda::zeros_of_stream(size_t(bytes), int(device), reinterpret_cast<cudaStream_t>(stream)); });
}

// Whether a pass on one machine and device is taken for another one.
const char* batch_norm_alike_forward(const ForwardParams* a,
                                     const cuda::Machine* machine_of_a,
                                     int64_t device_of_a,
                                     const ForwardParams* b,
                                     const cuda::Machine* machine_of_b,
                                     int64_t device_of_b,
                                     int64_t* alike) {
  return reported([&] {
    *alike = cuda::key_of(*a, *machine_of_a, int(device_of_a)) == cuda::key_of(*b, *machine_of_b, int(device_of_b));
  });
}

const char* batch_norm_alike_backward(const BackwardParams* a,
                                      const cuda::Machine* machine_of_a,
                                      int64_t device_of_a,
                                      const BackwardParams* b,
                                      const cuda::Machine* machine_of_b,
                                      int64_t device_of_b,
                                      int64_t* alike) {
  return reported([&] {
    *alike = cuda::key_of(*a, *machine_of_a, int(device_of_a)) == cuda::key_of(*b, *machine_of_b, int(device_of_b));
  });
}

}  // extern "C"
