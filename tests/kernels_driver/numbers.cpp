// Numbers of each dtype, to memory and back.
#include "numbers.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <limits>

namespace kernels_driver {
namespace {

struct Format {
  const char* name;
  size_t bytes;
  double eps;
  double step;
  double largest;
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {"float32", 4, 0x1p-23, 0x1p-149, std::numeric_limits<float>::max()};
    case DType::kFloat64:
      return {"float64", 8, 0x1p-52, 0x1p-1074, std::numeric_limits<double>::max()};
    case DType::kFloat16:
      return {"float16", 2, 0x1p-10, 0x1p-24, 65504};
    default:
      return {"bfloat16", 2, 0x1p-7, 0x1p-133, 0x1.FEp+127};
  }
}

// Calls body(from, to): double to a T, and back.
template <typename Body>
auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body([](double value) { return static_cast<float>(value); }, [](float value) { return double{value}; });
    case DType::kFloat64:
      return body([](double value) { return value; }, [](double value) { return value; });
    case DType::kFloat16:
      return body([](double value) { return __float2half_rn(static_cast<float>(value)); },
                  [](__half value) { return double{__half2float(value)}; });
    default:
      return body([](double value) { return __float2bfloat16_rn(static_cast<float>(value)); },
                  [](__nv_bfloat16 value) { return double{__bfloat162float(value)}; });
  }
}

}  // namespace

const char* name_of(DType dtype) { return format_of(dtype).name; }
size_t bytes_of(DType dtype) { return format_of(dtype).bytes; }
double eps_of(DType dtype) { return format_of(dtype).eps; }
double step_of(DType dtype) { return format_of(dtype).step; }
double largest_of(DType dtype) { return format_of(dtype).largest; }

Bytes to_memory(DType dtype, const Values& values) {
  return with_type(dtype, [&](auto from_double, auto) {
    Bytes memory(values.size() * sizeof(from_double(0)));
    unsigned char* at = memory.data();
    for (const double value : values) {
      const auto number = from_double(value);
      std::memcpy(at, &number, sizeof(number));
      at += sizeof(number);
    }
    return memory;
  });
}

Values from_memory(DType dtype, const Bytes& memory) {
  return with_type(dtype, [&](auto from_double, auto to_double) {
    auto number = from_double(0);
    Values values(memory.size() / sizeof(number));
    const unsigned char* at = memory.data();
    for (double& value : values) {
      std::memcpy(&number, at, sizeof(number));
      at += sizeof(number);
      value = to_double(number);
    }
    return values;
  });
}

}  // namespace kernels_driver
