// Chooses the instruction set once, at run time.
#include "instruction_set.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace bn_ext::cpu {
namespace {

struct KernelTables {
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Half> f16;
  Kernels<BFloat16> bf16;
};

KernelTables baseline_tables() {
  return {baseline::table<float>(), baseline::table<double>(), baseline::table<Half>(), baseline::table<BFloat16>()};
}
#if defined(__x86_64__)
KernelTables avx2_tables() {
  return {avx2::table<float>(), avx2::table<double>(), avx2::table<Half>(), avx2::table<BFloat16>()};
}
KernelTables avx512_tables() {
  return {avx512::table<float>(), avx512::table<double>(), avx512::table<Half>(), avx512::table<BFloat16>()};
}
#endif

struct Candidate {
  const char* name;
  KernelTables (*tables)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports does not know this name in Clang 15 and in GCC before 11.
bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The instruction sets that this processor supports, best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back({"avx512", avx512_tables});
  if (avx2) found.push_back({"avx2", avx2_tables});
#endif
  found.push_back({"baseline", baseline_tables});
  return found;
}

Candidate choose() {
  const std::vector<Candidate> found = candidates();
  const char* wanted = std::getenv("BN_EXT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return found.front();
  std::string names;
  for (const Candidate& candidate : found) {
    if (std::string(candidate.name) == wanted) return candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  throw std::invalid_argument("BN_EXT_CPU_CAPABILITY must be one of " + names + " on this processor, got " + wanted);
}

struct Chosen {
  const char* name;
  KernelTables tables;
};

const Chosen& chosen() {
  static const Chosen result = [] {
    const Candidate candidate = choose();
    return Chosen{candidate.name, candidate.tables()};
  }();
  return result;
}

}  // namespace

const char* instruction_set() { return chosen().name; }

template <>
const Kernels<float>& kernels<float>() {
  return chosen().tables.f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return chosen().tables.f64;
}
template <>
const Kernels<Half>& kernels<Half>() {
  return chosen().tables.f16;
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return chosen().tables.bf16;
}

}  // namespace bn_ext::cpu
