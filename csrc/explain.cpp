// See explain.h.
#include "explain.h"

#include "activation.h"
#include "arguments.h"
#include "cuda/plan.h"
#include "cuda/traffic.h"

namespace bn_ext {
namespace {

// Stands for a tensor: the planner only tests whether there is one, and its alignment.
void* some_tensor(bool exists) { return exists ? reinterpret_cast<void*>(uintptr_t{256}) : nullptr; }

const char* name_of(cuda::Team team) {
  switch (team) {
    case cuda::Team::kBlock:
      return "block";
    case cuda::Team::kCluster:
      return "cluster";
    case cuda::Team::kGrid:
      return "grid";
    default:
      return "none";
  }
}

template <typename Params>
Facts facts_of(const Params& p, const cuda::Plan& plan, const cuda::Plan& multi_kernel) {
  const int value_bytes = cuda::value_bytes(p.dtype), tiles = cuda::single_pass_tiles(p);
  const cuda::Traffic traffic = expected_traffic(p, plan), without = expected_traffic(p, multi_kernel);
  const size_t shared_bytes = plan.single_pass() ? cuda::SinglePassMemory(plan, tiles, value_bytes).bytes : 0;
  return {
      {"team", name_of(plan.team)},
      {"tiles", int64_t{tiles}},
      {"launches", int64_t{traffic.launches}},
      {"slices", plan.slices},
      {"slice_channels", int64_t{plan.slice_channels}},
      {"slice_bytes", plan.rows * plan.columns * plan.vector * value_bytes},
      {"blocks_per_slice", plan.segments},
      {"blocks", plan.blocks()},
      {"threads", int64_t{plan.threads}},
      {"access_bytes", int64_t{plan.vector} * value_bytes},
      {"shared_bytes", static_cast<int64_t>(shared_bytes)},
      {"rows", plan.rows},
      {"spilled_rows", plan.spilled_rows()},
      {"bytes_read", traffic.read},
      {"bytes_written", traffic.written},
      {"mask_bytes", traffic.mask_read + traffic.mask_written},
      {"multi_kernel_launches", int64_t{without.launches}},
      {"multi_kernel_bytes", without.bytes()},
  };
}

}  // namespace

std::pair<Facts, Facts> explain(int64_t n,
                                int64_t c,
                                int64_t s,
                                bool channels_last,
                                at::ScalarType dtype,
                                bool training,
                                OptionalName activation,
                                double activation_parameter,
                                bool residual,
                                int multiprocessors,
                                int shared_bytes,
                                bool clusters) {
  const cuda::Machine machine = {multiprocessors, shared_bytes, clusters, /*cooperative=*/true};
  ForwardParams f{};
  f.shape = {n, c, s, channels_last || s == 1};
  f.dtype = dtype_of(dtype);
  f.training = training;
  f.activation = parse({activation, activation_parameter});
  const bool has_mask = residual && f.activation.kind == ActivationKind::kReluLike;
  f.x = f.y = some_tensor(true);
  f.z = some_tensor(residual);
  f.mask = static_cast<uint8_t*>(some_tensor(has_mask));

  // As in batch_norm_backward: without an activation the residual's gradient is dy, and no kernel writes it.
  const bool has_dz = residual && f.activation.kind != ActivationKind::kNone;
  BackwardParams b{};
  b.shape = f.shape;
  b.dtype = f.dtype;
  b.training = training;
  b.activation = f.activation;
  b.dy = b.x = b.dx = b.dweight = b.dbias = some_tensor(true);
  b.z = some_tensor(has_dz && !has_mask);
  b.mask = f.mask;
  b.dz = some_tensor(has_dz);
  return {facts_of(f, plan_forward(f, machine), plan_forward(f, machine.without_teams())),
          facts_of(b, plan_backward(b, machine), plan_backward(b, machine.without_teams()))};
}

}  // namespace bn_ext
