// A case's tensors, its three passes, and what comes of them.
#include "run.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "../../csrc/cuda/kernels.h"
#include "device.h"
#include "reference.h"

namespace kernels_driver {
namespace {

using bn_ext::BackwardParams;
using bn_ext::ForwardParams;
using bn_ext::mask_bytes;
using bn_ext::cuda::TeamCounters;
using bn_ext::cuda::Workspace;

struct Tensor {
  DType dtype;
  Bytes given;  // inputs: what must still be there in the end
  DeviceMemory memory;
};

class Run {
 public:
  Run(const Case& c, const Machine& device, const RunOptions& options)
      : c_(c), options_(options), device_(device), inputs_(make_inputs(c)), reference_(make_reference(c, inputs_)) {}

  Outcome take() {
    ForwardParams forward = forward_params();
    pass("forward", forward);
    check_forward(forward);
    forward.recompute = true;
    forward.y = output("y recomputed");
    pass("recompute", forward);
    check_values("y recomputed", "y");
    const BackwardParams backward = backward_params(forward);
    pass("backward", backward);
    check_backward(backward);
    check_inputs();
    return std::move(outcome_);
  }

 private:
  void wrong(const std::string& sentence) { outcome_.wrong.push_back(sentence); }

  void* add(const std::string& name, DType dtype, size_t bytes, Bytes given = {}, size_t misalignment = 0) {
    Tensor tensor{dtype, std::move(given), DeviceMemory(bytes, misalignment)};
    if (!tensor.given.empty()) {
      tensor.memory.write(tensor.given);
    } else if (!options_.unwritten) {
      tensor.memory.fill_poison();
    }
    return tensors_.emplace(name, std::move(tensor)).first->second.memory.data();
  }
  // Activation tensors; null where there are no values.
  void* input(const char* name, const Values& values) {
    if (values.empty()) return nullptr;
    const Bytes memory = to_memory(c_.dtype, values);
    return add(name, c_.dtype, memory.size(), memory, c_.misalignment);
  }
  void* output(const char* name) {
    return add(name, c_.dtype, c_.shape.numel() * bytes_of(c_.dtype), {}, c_.misalignment);
  }
  // Vectors of the channels.
  void* param(const char* name, const Values& values) {
    return add(name, c_.params_dtype, values.size() * bytes_of(c_.params_dtype), to_memory(c_.params_dtype, values));
  }
  void* output_vector(const char* name, DType dtype) { return add(name, dtype, c_.shape.c * bytes_of(dtype)); }

  ForwardParams forward_params() {
    const DType saved = accumulate_dtype(c_.dtype);
    ForwardParams p{};
    p.shape = c_.shape;
    p.dtype = c_.dtype;
    p.params_dtype = c_.params_dtype;
    p.training = c_.training;
    p.activation = c_.activation.activation;
    p.x = input("x", inputs_.x);
    p.z = input("z", inputs_.z);
    if (c_.has_params) {
      p.weight = param("weight", inputs_.weight);
      p.bias = param("bias", inputs_.bias);
      p.running_mean = param("running_mean", inputs_.running_mean);
      p.running_var = param("running_var", inputs_.running_var);
      const auto* count = reinterpret_cast<const unsigned char*>(&inputs_.num_batches_tracked);
      Bytes bytes(count, count + sizeof(int64_t));
      p.num_batches_tracked = static_cast<int64_t*>(add("num_batches_tracked", c_.dtype, sizeof(int64_t), bytes));
    }
    p.cumulative = c_.cumulative;
    p.momentum = c_.huge ? 1 : kMomentum;
    p.skip_nonfinite = c_.skip_nonfinite;
    p.eps = kEps;
    p.y = output("y");
    p.mean = output_vector("mean", saved);
    p.rstd = output_vector("rstd", saved);
    p.scale = output_vector("scale", saved);
    p.offset = output_vector("offset", saved);
    if (c_.has_mask) p.mask = mask();
    return p;
  }

  // The backward pass copies whole words of it: what is behind the last value's bits is read, but not looked at.
  uint8_t* mask() {
    const size_t values = static_cast<size_t>(c_.shape.numel()), bytes = mask_bytes(c_.shape.numel());
    void* mask = add("mask", c_.dtype, bytes);
    const size_t written = (values + 7) / 8;
    tensors_.at("mask").memory.write(Bytes(bytes - written, 0xff), written);
    return static_cast<uint8_t*>(mask);
  }

  // As the operator calls it: a residual alone leaves dz = dy, and a mask stands in for the residual.
  BackwardParams backward_params(const ForwardParams& f) {
    const bool has_dz = c_.has_residual && c_.activation.activation.kind != bn_ext::ActivationKind::kNone;
    BackwardParams p{};
    p.shape = c_.shape;
    p.dtype = c_.dtype;
    p.params_dtype = c_.params_dtype;
    p.training = c_.training;
    p.activation = f.activation;
    p.dy = input("dy", inputs_.dy);
    p.dy_is_scalar = c_.dy_is_scalar;
    p.x = f.x;
    p.z = has_dz && !c_.has_mask ? f.z : nullptr;
    p.mask = f.mask;
    p.mean = f.mean;
    p.rstd = f.rstd;
    p.scale = f.scale;
    p.offset = f.offset;
    if (c_.wanted.dx) p.dx = output("dx");
    if (c_.wanted.dz && has_dz) p.dz = output("dz");
    if (c_.wanted.dweight) p.dweight = output_vector("dweight", c_.params_dtype);
    if (c_.wanted.dbias) p.dbias = output_vector("dbias", c_.params_dtype);
    return p;
  }

  static cudaError_t launch(const ForwardParams& p, const Plan& plan, const Workspace& workspace) {
    return bn_ext::cuda::launch_forward(p, plan, workspace, nullptr);
  }
  static cudaError_t launch(const BackwardParams& p, const Plan& plan, const Workspace& workspace) {
    return bn_ext::cuda::launch_backward(p, plan, workspace, nullptr);
  }
  static size_t workspace_bytes(const ForwardParams& p, const Plan& plan) {
    return bn_ext::cuda::forward_workspace_bytes(p, plan);
  }
  static size_t workspace_bytes(const BackwardParams& p, const Plan& plan) {
    return bn_ext::cuda::backward_workspace_bytes(p, plan);
  }

  Machine machine_of(const ForwardParams&) const { return machine_that_keeps(false); }
  Machine machine_of(const BackwardParams& p) const { return machine_that_keeps(p.mask != nullptr); }
  Machine machine_that_keeps(bool mask) const {
    const int access = static_cast<int>(c_.misalignment > 0 ? c_.misalignment : 16);
    return machine_for(c_.path, {c_.shape, static_cast<int>(bytes_of(c_.dtype)), access, false, 2, mask}, device_);
  }

  template <typename Params>
  void pass(const char* name, const Params& p) {
    const Plan plan = bn_ext::cuda::choose_plan(p, machine_of(p));
    const Path path = bn_ext::cuda::single_pass_tiles(p) > 0 ? c_.path : Path::kMultiKernel;
    if (c_.path != Path::kAny && !takes(path, plan)) {
      wrong(std::string(name) + " did not take this path but " + words(plan));
    }
    for (Launched& launched : launched_by(p, plan)) outcome_.launched.push_back(std::move(launched));
    const size_t bytes = workspace_bytes(p, plan);
    Workspace workspace{};
    if (bytes > 0) workspace.memory = add(std::string("workspace of ") + name, c_.dtype, bytes);
    const Bytes zeros(std::max(counter_bytes(plan), sizeof(TeamCounters)));
    DeviceMemory counters(zeros.size(), 0);
    counters.write(zeros);
    workspace.counters = static_cast<TeamCounters*>(counters.data());
    check(launch(p, plan, workspace), name);
    check(cudaDeviceSynchronize(), name);
    if (counters.read(zeros.size()) != zeros) wrong(std::string(name) + " has left counters that are not zero");
  }

  static std::string words(const Plan& plan) {
    const char* teams[] = {"the multi-kernel path", "teams of one block", "teams of clusters", "teams of a grid"};
    return teams[static_cast<int>(plan.team)] +
           std::string(plan.single_pass() && plan.spilled_rows() > 0 ? ", spilling" : "");
  }

  void check_forward(const ForwardParams& p) {
    for (const char* name : {"y", "mean", "rstd", "scale", "offset"}) check_values(name, name);
    if (p.mask != nullptr) check_mask();
    if (!c_.has_params) return;
    for (const char* name : {"running_mean", "running_var"}) check_values(name, name);
    Bytes count = tensors_.at("num_batches_tracked").memory.read(sizeof(int64_t));
    if (options_.spoil == "num_batches_tracked") ++count[0];
    const unsigned expected = static_cast<unsigned>(inputs_.num_batches_tracked) + c_.training;
    if (count[0] != expected) {
      wrong("num_batches_tracked is " + std::to_string(count[0]) + ", should be " + std::to_string(expected));
    }
  }

  void check_backward(const BackwardParams& p) {
    if (p.dx != nullptr) check_values("dx", "dx");
    if (p.dz != nullptr) check_values("dz", "dz");
    if (p.dweight != nullptr) check_values("dweight", "dweight");
    if (p.dbias != nullptr) check_values("dbias", "dbias");
  }

  void check_values(const std::string& name, const char* name_of_reference) {
    const Result& expected = reference_.results.at(name_of_reference);
    const Tensor& tensor = tensors_.at(name);
    Values values = from_memory(tensor.dtype, tensor.memory.read(expected.values.size() * bytes_of(tensor.dtype)));
    const size_t spoilt = c_.seed % values.size();
    if (options_.spoil == name) values[spoilt] += 2 * expected.errors[spoilt];
    size_t count = 0, first = 0;
    for (size_t i = values.size(); i-- > 0;) {
      const double should_be = expected.values[i], off = std::fabs(values[i] - should_be);
      if (values[i] == should_be || off <= expected.errors[i]) continue;  // NaN is not
      ++count;
      first = i;
    }
    if (count == 0) return;
    wrong(name + "[" + std::to_string(first) + "] is " + text(values[first]) + ", should be " +
          text(expected.values[first]) + " within " + text(expected.errors[first]) + " (" + std::to_string(count) +
          " of " + std::to_string(values.size()) + " are wrong)");
  }

  static std::string text(double value) {
    char buffer[32];
    std::snprintf(buffer, sizeof(buffer), "%.9g", value);
    return buffer;
  }

  void check_mask() {
    const size_t values = static_cast<size_t>(c_.shape.numel());
    Bytes bytes = tensors_.at("mask").memory.read((values + 7) / 8);  // no pass writes what is behind them
    for (size_t i = 0; i < values; ++i) {
      if (reference_.near_kink[i]) continue;
      if (options_.spoil == "mask" && i >= c_.seed % values) bytes[i / 8] ^= 1 << i % 8;
      if ((bytes[i / 8] >> i % 8 & 1) == reference_.passed[i]) continue;
      return wrong("the mask's bit " + std::to_string(i) + " should be " + std::to_string(reference_.passed[i]));
    }
  }

  void check_inputs() {
    for (const char* name : {"x", "z", "dy", "weight", "bias"}) {
      const auto found = tensors_.find(name);
      if (found == tensors_.end()) continue;
      const Tensor& tensor = found->second;
      if (tensor.memory.read(tensor.given.size()) != tensor.given) wrong(std::string(name) + " was changed");
    }
  }

  const Case& c_;
  const RunOptions& options_;
  const Machine& device_;
  Inputs inputs_;
  Reference reference_;
  std::map<std::string, Tensor> tensors_;
  Outcome outcome_;
};

}  // namespace

Outcome run(const Case& c, const Machine& device, const RunOptions& options) { return Run(c, device, options).take(); }

}  // namespace kernels_driver
