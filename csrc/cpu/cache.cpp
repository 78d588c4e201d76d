// Reads sysfs, because the values of sysconf can be those of another machine.
#include "cache.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

namespace bn_ext::cpu {
namespace {

constexpr int64_t kUnknown = int64_t(32) << 20;

// Returns the size of the first core's largest cache; 0 if none can be read. sysfs has sizes such as "32768K".
int64_t largest_cache() {
  int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = ' ';
    if (!(file >> size >> unit)) continue;
    const int64_t bytes = size * (unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1);
    largest = bytes > largest ? bytes : largest;
  }
  return largest;
}

int64_t parse(const std::string& given) {
  const bool is_number = given.size() <= 18 && given.find_first_not_of("0123456789") == std::string::npos;
  if (is_number) return std::stoll(given);
  throw std::invalid_argument("BN_EXT_CPU_CACHE_BYTES must be a number of bytes such as 33554432, got " + given);
}

constexpr int64_t kNotGiven = -1;

int64_t given_bytes() {
  const char* given = std::getenv("BN_EXT_CPU_CACHE_BYTES");
  return given != nullptr && *given != '\0' ? parse(given) : kNotGiven;
}

}  // namespace

// A virtual machine reports the whole cache of a processor that it shares with others: 260 or 300 MiB for 2 cores. A
// core can use little more than its share of such a cache.
int64_t usable_cache_bytes(int64_t reported, int threads) {
  constexpr int64_t kOfMachine = int64_t(32) << 20, kOfThread = int64_t(4) << 20;
  return std::min(reported, std::max(kOfMachine, threads * kOfThread));
}

int64_t last_level_cache_bytes(int threads) {
  static const int64_t given = given_bytes();
  static const int64_t found = largest_cache();
  if (given != kNotGiven) return given;
  return usable_cache_bytes(found == 0 ? kUnknown : found, threads);
}

}  // namespace bn_ext::cpu
