// The policies: from a seed to an order of clusters and threads.
#include <numeric>

#include "scheduler.h"

namespace cuda_on_cpu {

Ordering::Ordering(const Order& order, const Launch& launch)
    : policy_(order.policy),
      clusters_(launch.clusters()),
      state_(order.seed * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(launch.number)) {
  do {
    step_ = clusters_ > 2 ? 1 + random() % (clusters_ - 1) : 1;
  } while (std::gcd(step_, clusters_) != 1);
  start_ = random() % clusters_;
}

std::uint64_t Ordering::cluster(std::uint64_t turn) const {
  switch (policy_) {
    case Policy::ascending:
      return turn;
    case Policy::descending:
      return clusters_ - 1 - turn;
    default:
      return (turn * step_ + start_) % clusters_;  // both below 2^32 but for grids that no test runs
  }
}

std::uint64_t Ordering::key(Thread& thread) {
  const std::uint64_t position = thread.block->number << 10 | thread.rank;
  switch (policy_) {
    case Policy::ascending:
      return position;
    case Policy::descending:
      return ~position;
    case Policy::random:
      return random();
    case Policy::priorities:
      break;
  }
  // A slow block or warp stays slow for a while: uniform choice hardly ever lets one fall far behind.
  if (random() % 64 == 0) thread.warp->priority = priority();
  if (random() % 1024 == 0) thread.block->priority = priority();
  return thread.block->priority << 40 | thread.warp->priority << 20 | priority();
}

bool Ordering::preempts() { return (policy_ == Policy::random || policy_ == Policy::priorities) && random() % 16 == 0; }

std::uint64_t Ordering::random() {  // splitmix64 (Steele, Lea and Flood 2014)
  std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

}  // namespace cuda_on_cpu
