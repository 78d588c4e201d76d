// A cache of the plans of passes that a thread has launched. For the next pass of the same kind, CUDA is called only
// for the launches. Includes no torch header.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>

#include "kernels.h"
#include "launched_before.h"

namespace bn_ext::cuda {

// Returns a number unchanged; of an address, whether it is null and its alignment, as far as the widest access needs
// it.
template <typename T>
uint64_t key_word(const T& value) {
  uint64_t word = 0;
  if constexpr (std::is_pointer_v<T>) {
    if (value != nullptr) word = kWidestAccess | reinterpret_cast<uintptr_t>(value) % kWidestAccess;
  } else if constexpr (std::is_same_v<T, double>) {
    std::memcpy(&word, &value, sizeof(word));
  } else {
    word = static_cast<uint64_t>(value);
  }
  return word;
}
template <typename... Values>
std::array<uint64_t, sizeof...(Values)> key_words(const Values&... values) {
  return {key_word(values)...};
}

// The key contains everything on which the plan and the choice of kernels depend, so not the numbers that only kernels
// read. Each function names all members of its struct, so a new member does not compile until it is considered here.
inline auto key_of(const Shape& shape) {
  const auto& [n, c, s, channels_last] = shape;
  return key_words(c, s, n, channels_last);
}
inline auto key_of(const Activation& activation) {
  const auto& [kind, alpha, upper] = activation;
  return key_words(kind, alpha, upper);
}
inline auto key_of(const Machine& machine) {
  const auto& [multiprocessors,
               shared_bytes,
               clusters,
               cooperative,
               pdl,
               staggers,
               prefetched,
               half_chip,
               evict_last,
               keep_results,
               three_kernels] = machine;
  return std::make_tuple(key_words(multiprocessors, shared_bytes, clusters, cooperative, pdl),
                         key_words(staggers, prefetched, half_chip, evict_last, keep_results, three_kernels));
}
inline auto key_of(const ForwardParams& p) {
  const auto& [shape,
               dtype,
               params_dtype,
               training,
               recompute,
               activation,
               x,
               z,
               weight,
               bias,
               running_mean,
               running_var,
               count,
               cumulative,
               momentum,
               skip_nonfinite,
               eps,
               y,
               mean,
               rstd,
               scale,
               offset,
               mask] = p;
  (void)momentum, (void)eps;  // values that a schedule changes would fill the cache
  return std::make_tuple(key_of(shape),
                         key_of(activation),
                         key_words(dtype, params_dtype, training, recompute, cumulative, skip_nonfinite),
                         key_words(x, z, y, mask, weight, bias, running_mean, running_var, count),
                         key_words(mean, rstd, scale, offset));
}
inline auto key_of(const BackwardParams& p) {
  const auto& [shape,
               dtype,
               params_dtype,
               training,
               activation,
               dy,
               dy_is_scalar,
               x,
               z,
               mask,
               mean,
               rstd,
               scale,
               offset,
               dx,
               dz,
               dweight,
               dbias] = p;
  return std::make_tuple(key_of(shape),
                         key_of(activation),
                         key_words(dtype, params_dtype, training, dy_is_scalar),
                         key_words(dy, x, z, mask, dx, dz, dweight, dbias),
                         key_words(mean, rstd, scale, offset));
}
template <typename Params>
auto key_of(const Params& p, const Machine& machine, int device) {
  return std::make_tuple(key_of(p), key_of(machine), device);
}

// Like launch_or_do_without_teams, with the plan of this thread's last pass of the same kind on this device. If there
// is none, it chooses a plan, and caches it unless CUDA refuses it. `device` must be the current device.
template <typename Params, typename Launch>
cudaError_t launch_by_known_plan(
    const Params& p, const Machine& machine, int device, Plan& plan, const Launch& launch) {
  using Key = decltype(key_of(p, machine, device));
  constexpr size_t kMostPlans = 128;  // more than most networks have different layers
  thread_local std::map<Key, Plan> plans;
  const Key key = key_of(p, machine, device);
  const auto found = plans.find(key);
  const bool is_known = found != plans.end();
  plan = is_known ? found->second : choose_plan(p, machine);
  const Team team = plan.team;
  const cudaError_t error = launch_or_do_without_teams(p, machine, plan, [&](const Plan& tried) {
    const LaunchedBefore before(is_known && tried.team == team);
    return launch(tried);
  });
  if (error != cudaSuccess || plan.team != team) {
    plans.erase(key);
  } else if (!is_known) {
    if (plans.size() == kMostPlans) plans.clear();
    plans.emplace(key, plan);
  }
  return error;
}

}  // namespace bn_ext::cuda
