// From a type and a plan, known at run time, to template parameters.
#pragma once

#include <type_traits>

#include "plan.h"
#include "vector.cuh"
#include "walk.cuh"

namespace bn_ext::cuda {

// Calls body(T{}, Int<kVector>, std::bool_constant<kOneChannel>) for the widths that plans of T have.
template <typename T, typename Body>
cudaError_t dispatch_plan(const Plan& plan, const Body& body) {
  constexpr int kWidest = 16 / sizeof(T);
  const auto with_width = [&](auto width) {
    return plan.one_channel ? body(T{}, width, std::true_type{}) : body(T{}, width, std::false_type{});
  };
  if (plan.vector == kWidest) return with_width(Int<kWidest>{});
  if constexpr (sizeof(T) == 2) {
    if (plan.vector == 2) return with_width(Int<2>{});
  }
  return body(T{}, Int<1>{}, std::true_type{});
}

template <typename Body>
cudaError_t dispatch(DType dtype, const Plan& plan, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return dispatch_plan<float>(plan, body);
    case DType::kFloat64:
      return dispatch_plan<double>(plan, body);
    case DType::kFloat16:
      return dispatch_plan<__half>(plan, body);
    case DType::kBFloat16:
      return dispatch_plan<__nv_bfloat16>(plan, body);
  }
  return cudaErrorInvalidValue;
}

}  // namespace bn_ext::cuda
