// Kernels and ways of a pass, as launch_forward and launch_backward of csrc/cuda choose them.
#include "coverage.h"

#include "activations.h"

namespace kernels_driver {
namespace {

using bn_ext::Activation;
using bn_ext::ActivationKind;
using bn_ext::BackwardParams;
using bn_ext::ForwardParams;
using bn_ext::cuda::Machine;
using bn_ext::cuda::Plan;
using bn_ext::cuda::Team;
using bn_ext::cuda::Variant;

constexpr const char* kVariants[] = {"plain", "relu", "relu_like", "any"};  // as in plan.h
constexpr const char* kKinds[] = {
    "none", "relu_like", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh", "mish"};  // as in params.h
constexpr const char* kTeams[] = {"none", "block", "cluster", "grid"};                                 // as in plan.h

std::string words(bool value) { return value ? "true" : "false"; }

std::string type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float";
    case DType::kFloat64:
      return "double";
    case DType::kFloat16:
      return "__half";
    default:
      return "__nv_bfloat16";
  }
}

// "name<type, vector, one_channel": what most kernels have in common.
std::string instance(const char* name, DType dtype, int vector, bool one_channel) {
  return std::string(name) + "<" + type_of(dtype) + ", " + std::to_string(vector) + ", " + words(one_channel);
}
std::string instance(const char* name, DType dtype, const Plan& plan) {
  return instance(name, dtype, plan.vector, plan.one_channel);
}

template <typename Params>
std::string variant(const Params& p, const Plan& plan) {
  return std::string(", ") + kVariants[static_cast<int>(bn_ext::cuda::variant_of(p, plan))];
}

class Pass {
 public:
  explicit Pass(const Plan& plan) : plan_(plan) {}

  void launch(const char* name, const std::string& kernel) {
    name_ = name;
    launched_.push_back({kernel, {}});
    way(plan_.uses_pdl && plan_.team != Team::kGrid, "PDL");
    const std::string team = kTeams[static_cast<int>(plan_.team)];
    const bool is_smaller = plan_.channels_of(plan_.slices - 1) < plan_.slice_channels;
    way(plan_.slices > 1 && is_smaller, plan_.single_pass() ? team + ", last slice smaller" : "last slice smaller");
    way(plan_.segments > 1, "segments");
    if (!plan_.single_pass()) return;
    const std::string keeps = plan_.spilled_rows() > 0 ? ", spilling" : "";
    way(true, team + keeps + (plan_.one_channel ? ", one channel" : ", channels"));
    way(plan_.teams < plan_.slices, "slice after slice");
  }
  void way(bool is_taken, const std::string& words) {
    if (is_taken) launched_.back().ways.push_back(std::string(name_) + ": " + words);
  }
  void activation_ways(const Activation& activation, const void* z) {
    way(true, std::string("activation ") + kKinds[static_cast<int>(activation.kind)]);
    way(z != nullptr, "residual");
  }
  std::vector<Launched> take() { return std::move(launched_); }

 private:
  const Plan& plan_;
  const char* name_ = "";
  std::vector<Launched> launched_;
};

std::string mask_way(const Plan& plan) {
  return std::string("mask by ") + (plan.whole_bytes ? "lanes, " : "atomics, ") + std::to_string(plan.vector);
}

}  // namespace

std::vector<Launched> launched_by(const ForwardParams& p, const Plan& plan) {
  Pass pass(plan);
  const bool has_statistics = p.training && !p.recompute;
  if (has_statistics && !plan.single_pass()) {
    pass.launch("statistics_kernel", instance("statistics_kernel", p.dtype, plan) + ">");
    pass.launch("finalise_statistics_kernel", "finalise_statistics_kernel<" + type_of(p.dtype) + ">");
    pass.way(p.cumulative && p.num_batches_tracked != nullptr, "cumulative");
  }
  const char* last = has_statistics && plan.single_pass() ? "single_pass_forward_kernel" : "apply_kernel";
  pass.launch(last, instance(last, p.dtype, plan) + variant(p, plan) + ">");
  pass.activation_ways(p.activation, p.z);
  pass.way(p.mask != nullptr && !p.recompute, mask_way(plan));
  pass.way(!p.training, "eval");
  pass.way(p.recompute, "recompute");
  return pass.take();
}

std::vector<Launched> launched_by(const BackwardParams& params, const Plan& plan) {
  BackwardParams p = params;
  Pass pass(plan);
  const auto launch = [&](const char* name, const std::string& more) {
    const void* z = p.mask == nullptr ? p.z : nullptr;  // else it is not looked at
    pass.launch(name, instance(name, p.dtype, plan) + variant(p, plan) + more + ">");
    pass.activation_ways(p.activation, z);
    const bool has_mask = p.mask != nullptr && bn_ext::cuda::variant_of(p) == Variant::kReluLike;
    pass.way(has_mask, "mask");
    pass.way(p.dy_is_scalar, "one dy");
    pass.way(!p.training, "eval");
    pass.way(p.dz != nullptr, "dz");
    pass.way(p.dx == nullptr, "no dx");
  };
  if (plan.single_pass()) {
    launch("single_pass_backward_kernel", ", " + words(p.mask != nullptr));
    return pass.take();
  }
  if (p.needs_sums()) {
    const bool chooses = bn_ext::cuda::variant_of(p, plan) <= Variant::kRelu;
    const bool writes = !chooses || p.dz != nullptr || (p.dx != nullptr && !p.training);
    launch("grad_sums_kernel", ", " + words(writes));
    const char* finalise = "finalise_gradients_kernel";
    pass.launch(finalise, finalise + ("<" + type_of(p.dtype)) + ">");
    p = bn_ext::cuda::after_sums(p);
  }
  if (p.dx != nullptr || p.dz != nullptr) launch("grad_input_kernel", "");
  return pass.take();
}

std::set<std::string> all_kernels() {
  std::set<std::string> kernels;
  for (const DType dtype : kDTypes) {
    const int bytes = static_cast<int>(bytes_of(dtype));
    kernels.insert("finalise_statistics_kernel<" + type_of(dtype) + ">");
    kernels.insert("finalise_gradients_kernel<" + type_of(dtype) + ">");
    for (int vector = 16 / bytes; vector > 0; vector /= 2) {
      for (const bool one_channel : {true, false}) {
        if (vector == 1 && !one_channel) continue;
        const auto add = [&](const char* name, const std::string& more) {
          kernels.insert(instance(name, dtype, vector, one_channel) + more + ">");
        };
        add("statistics_kernel", "");
        add("grad_sums_kernel", ", plain, false");
        for (const char* name : kVariants) {
          const std::string chosen = std::string(", ") + name;
          if (name == kVariants[1] && vector * bytes != bn_ext::cuda::kWidestAccess) continue;
          if (name == kVariants[3] && vector > bn_ext::cuda::most_values_of_any(bytes)) continue;
          for (const char* kernel : {"apply_kernel", "single_pass_forward_kernel", "grad_input_kernel"}) {
            add(kernel, chosen);
          }
          add("single_pass_backward_kernel", chosen + ", false");
          if (name == kVariants[2]) add("single_pass_backward_kernel", chosen + ", true");
          add("grad_sums_kernel", chosen + ", true");
          if (name == kVariants[1]) add("grad_sums_kernel", chosen + ", false");
        }
      }
    }
  }
  return kernels;
}

std::set<std::string> all_ways(const Machine& device) {
  std::set<std::string> ways;
  const auto add = [&](const char* kernel, const std::string& way) { ways.insert(std::string(kernel) + ": " + way); };
  const char *forwards[] = {"apply_kernel", "single_pass_forward_kernel"},
             *single_pass[] = {"single_pass_forward_kernel", "single_pass_backward_kernel"},
             *backwards[] = {"grad_sums_kernel", "grad_input_kernel", "single_pass_backward_kernel"},
             *multi_kernel[] = {"grad_sums_kernel", "grad_input_kernel"};
  for (const char* kind : kKinds) {
    for (const char* kernel : forwards) add(kernel, std::string("activation ") + kind);
    for (const char* kernel : backwards) add(kernel, std::string("activation ") + kind);
  }
  for (const char* kernel : forwards) {
    add(kernel, "residual");
    for (const char* vector : {"1", "2", "4"}) add(kernel, std::string("mask by atomics, ") + vector);
    for (const char* vector : {"1", "2", "4", "8"}) add(kernel, std::string("mask by lanes, ") + vector);
  }
  for (const char* kernel : backwards) {
    for (const char* way : {"mask", "dz"}) add(kernel, way);
  }
  for (const char* kernel : multi_kernel) {
    for (const char* way : {"residual", "one dy", "eval", "no dx"}) add(kernel, way);
  }
  for (const char* way : {"eval", "recompute"}) add("apply_kernel", way);
  for (const char* kernel : multi_kernel) {
    for (const char* way : {"segments", "last slice smaller"}) add(kernel, way);
  }
  add("apply_kernel", "last slice smaller");
  for (const char* way : {"segments", "last slice smaller"}) add("statistics_kernel", way);
  add("finalise_statistics_kernel", "cumulative");
  add("single_pass_backward_kernel", "no dx");
  for (const char* kernel : single_pass) {
    for (const char* channels : {", one channel", ", channels"}) {
      add(kernel, std::string("block") + channels);
      for (const char* spills : {"", ", spilling"}) {
        if (device.clusters) add(kernel, std::string("cluster") + spills + channels);
        if (device.cooperative) add(kernel, std::string("grid") + spills + channels);
      }
    }
    add(kernel, "block, last slice smaller");
    if (device.clusters) add(kernel, "cluster, last slice smaller");
    if (!device.cooperative) continue;
    for (const char* way : {"grid, last slice smaller", "slice after slice"}) add(kernel, way);
  }
  if (!device.pdl) return ways;
  for (const char* kernel : {"statistics_kernel",
                             "finalise_statistics_kernel",
                             "apply_kernel",
                             "grad_sums_kernel",
                             "finalise_gradients_kernel",
                             "grad_input_kernel",
                             "single_pass_forward_kernel",
                             "single_pass_backward_kernel"}) {
    add(kernel, "PDL");
  }
  return ways;
}

}  // namespace kernels_driver
