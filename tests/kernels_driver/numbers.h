// Numbers as they lie in memory, and as the driver computes with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../csrc/params.h"

namespace kernels_driver {

using bn_ext::DType;

// Wide enough that its own rounding does not count, also for results in float64.
using Real = long double;

using Values = std::vector<double>;
using Bytes = std::vector<unsigned char>;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

const char* name_of(DType dtype);
size_t bytes_of(DType dtype);

// Of the saved vectors, and what kernels compute in.
constexpr DType accumulate_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

double eps_of(DType dtype);      // from 1 to the next number
double step_of(DType dtype);     // from 0 to the next number
double largest_of(DType dtype);  // finite one

// To the nearest, as they lie, and back, which is exact.
Bytes to_memory(DType dtype, const Values& values);
Values from_memory(DType dtype, const Bytes& memory);

}  // namespace kernels_driver
