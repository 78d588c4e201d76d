// Stands in for CUDA's header of this name: a 16-bit float of one sign, five exponent and ten mantissa bits.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  // The bits moved into place are the value times 2^-112, subnormal numbers included.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((h.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinity, NaN
  bits |= static_cast<std::uint32_t>(h.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

// To nearest, ties to even. As in CUDA every NaN becomes 0x7fff.
inline __half __float2half_rn(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // from 65520 on: infinity
  if (magnitude < 0x38800000) {  // below 2^-14: the addition rounds, for the last bit of 0.5 is the least subnormal
    float rounded;
    std::memcpy(&rounded, &magnitude, 4);
    rounded += 0.5f;
    std::memcpy(&magnitude, &rounded, 4);
    return {static_cast<std::uint16_t>(sign | (magnitude - 0x3f000000))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000) >> 13))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
