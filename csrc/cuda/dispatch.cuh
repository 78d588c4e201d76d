// Maps a plan and a variant, which are run-time values, to template parameters.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "plan.h"
#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Calls body(Int<kVector>, std::bool_constant<kOneChannel>). Plans have accesses of at most 16 bytes.
template <typename T, int kVector = kWidestAccess / sizeof(T), typename Body>
cudaError_t dispatch_plan(const Plan& plan, const Body& body) {
  if constexpr (kVector > 1) {
    if (plan.vector != kVector) return dispatch_plan<T, kVector / 2>(plan, body);
    if (!plan.one_channel) return body(Int<kVector>{}, std::false_type{});
  }
  return body(Int<kVector>{}, std::true_type{});
}

// Calls body(std::integral_constant<Variant, ...>), for accesses of kVector values of T.
template <typename T, int kVector, typename Body>
cudaError_t dispatch_variant(Variant variant, const Body& body) {
  if (variant == Variant::kPlain) return body(std::integral_constant<Variant, Variant::kPlain>{});
  if constexpr (kVector * sizeof(T) == kWidestAccess) {
    if (variant == Variant::kRelu) return body(std::integral_constant<Variant, Variant::kRelu>{});
  }
  if (variant == Variant::kReluLike) return body(std::integral_constant<Variant, Variant::kReluLike>{});
  if constexpr (kVector <= most_values_of_any(sizeof(T))) return body(std::integral_constant<Variant, Variant::kAny>{});
  return cudaErrorInvalidValue;  // no plan has so wide accesses for kAny
}

// Calls body(Int<kVector>, std::bool_constant<kOneChannel>, std::integral_constant<Variant, ...>).
template <typename T, typename Body>
cudaError_t dispatch_plan(const Plan& plan, Variant variant, const Body& body) {
  return dispatch_plan<T>(plan, [&](auto vector, auto one_channel) {
    return dispatch_variant<T, vector.value>(variant, [&](auto chosen) { return body(vector, one_channel, chosen); });
  });
}

}  // namespace bn_ext::cuda
