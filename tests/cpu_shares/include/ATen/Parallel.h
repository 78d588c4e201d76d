// Replaces torch's header: at::parallel_for by the rule of torch's ParallelOpenMP.h, one thread's chunk after the
// other, with the number of threads that a case names. It adds up the values that the kernels count.
#pragma once

#include <algorithm>
#include <cstdint>

namespace shares {

inline int threads = 1;
inline int64_t counted = 0;  // values that the current thread has been given in this region
inline int64_t total = 0;    // values of all threads and regions
inline int64_t busiest = 0;  // the most values of one thread in each region, added up: regions wait for each other

}  // namespace shares

namespace at {

inline int get_num_threads() { return shares::threads; }

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t units = end - begin;
  if (units <= 0) return;
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t threads = units > grain && units > 1 ? shares::threads : 1;
  if (grain > 0) threads = std::min(threads, divide_up(units, grain));
  const int64_t chunk = divide_up(units, threads);
  int64_t most = 0;
  for (int64_t first = begin; first < end; first += chunk) {
    shares::counted = 0;
    body(first, std::min(end, first + chunk));
    shares::total += shares::counted;
    most = std::max(most, shares::counted);
  }
  shares::busiest += most;
}

}  // namespace at
