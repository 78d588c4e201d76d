// Barriers, warp operations and waits: who waits for whom, what comes out, and what can never come out.
#include <cstring>

#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned kMissing = ~0u;
constexpr std::uint64_t kUndefined = ~std::uint64_t{0};  // a NaN of either width

bool same_place(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

const char* name(Operation operation) {
  switch (operation) {
    case Operation::shuffle:
      return "__shfl_sync";
    case Operation::shuffle_xor:
      return "__shfl_xor_sync";
    case Operation::shuffle_down:
      return "__shfl_down_sync";
    case Operation::ballot:
      return "a vote";
    case Operation::sync:
      return "__syncwarp";
  }
  return "";
}

// "waits at __syncthreads (file.cu:12)"
std::string standing(const Thread& thread) {
  if (thread.state == State::exited) return "has exited";
  if (thread.state == State::ready) return "runs";
  if (thread.state == State::asleep) return "sleeps (" + name(thread.place) + "), and no one writes any more";
  const char* what = thread.state == State::at_barrier           ? "__syncthreads"
                     : thread.state == State::at_cluster_barrier ? "the cluster's barrier"
                     : thread.state == State::at_grid_barrier    ? "the grid's barrier"
                                                                 : name(thread.request.operation);
  return std::string("waits at ") + what + " (" + name(thread.place) + ")";
}

template <typename Condition>
const Thread* find_thread(const Block& block, const Condition& condition) {
  for (const Thread& thread : block.threads) {
    if (condition(thread)) return &thread;
  }
  return nullptr;
}

std::string lane_name(const Thread& thread) {
  return "lane " + std::to_string(thread.lane()) + " of warp " + std::to_string(thread.warp->number);
}

// A barrier that some left or passed by can never open.
[[noreturn]] void fault_barrier(const Thread& waiting, const Thread& other) {
  scheduler.fault("deadlock: " + name(waiting) + " " + standing(waiting) + ", " + name(other) + " " + standing(other));
}

// The lane that a shuffle takes its value from; kMissing: its own.
unsigned source_lane(const WarpRequest& request, unsigned lane) {
  const unsigned width = static_cast<unsigned>(request.width);
  const unsigned first = lane & ~(width - 1);
  const unsigned argument = static_cast<unsigned>(request.argument);
  switch (request.operation) {
    case Operation::shuffle:
      return first + (argument & (width - 1));
    case Operation::shuffle_xor:
      return (lane ^ argument) < first + width ? lane ^ argument : kMissing;
    case Operation::shuffle_down:
      return argument < first + width - lane ? lane + argument : kMissing;
    default:
      return kMissing;
  }
}

// All lanes of the mask are here: their results.
void resolve(Block& block, const Warp& warp, unsigned mask) {
  std::uint64_t votes = 0;
  for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
    if (mask >> lane & 1) votes |= block.thread(warp, lane).request.value << lane;
  }
  for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = block.thread(warp, lane);
    const unsigned source = source_lane(thread.request, lane);
    if (thread.request.operation == Operation::ballot) {
      thread.result = votes & mask;
    } else if (source == kMissing) {
      thread.result = thread.request.value;
    } else {
      thread.result = mask >> source & 1 ? block.thread(warp, source).request.value : kUndefined;
    }
  }
}

void check_request(const Thread& thread, Place place) {
  const WarpRequest& request = thread.request;
  const Warp& warp = *thread.warp;
  const int width = request.width;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    scheduler.fault("a shuffle has width " + std::to_string(width) + ", which is no power of two up to 32", place);
  }
  if (!(request.mask >> thread.lane() & 1)) {
    scheduler.fault(
        "the mask of " + std::string(name(request.operation)) + " does not name its own " + lane_name(thread), place);
  }
  const unsigned gone = request.mask & (~warp.lanes | warp.exited);
  if (gone == 0) return;
  const unsigned lane = static_cast<unsigned>(__builtin_ctz(gone));
  scheduler.fault("the mask of " + std::string(name(request.operation)) + " names lane " + std::to_string(lane) +
                      (warp.lanes >> lane & 1 ? ", which has exited" : ", which the block does not have"),
                  place);
}

// Whether all lanes of the mask wait at this very operation; a fault if one waits at another and for this one.
bool all_here(const Thread& thread) {
  const unsigned mask = thread.request.mask;
  for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = thread.block->thread(*thread.warp, lane);
    if (other.request.mask == mask && other.request.operation == thread.request.operation &&
        same_place(other.place, thread.place)) {
      continue;
    }
    if (!(other.request.mask >> thread.lane() & 1)) return false;  // it is to come here after its own group's
    scheduler.fault("deadlock: " + lane_name(thread) + " " + standing(thread) + ", " + lane_name(other) + " " +
                    standing(other) + ", and each waits for the other");
  }
  return true;
}

}  // namespace

void barrier(Place place) {
  Thread& thread = running_thread();
  Block& block = *thread.block;
  thread.place = place;
  thread.state = State::at_barrier;
  if (block.at_barrier == 0) block.barrier_place = place;
  if (block.exited > 0 || !same_place(place, block.barrier_place)) {
    fault_barrier(thread, *find_thread(block, [&](const Thread& other) {
                    return other.state == State::exited ||
                           (other.state == State::at_barrier && !same_place(other.place, place));
                  }));
  }
  if (++block.at_barrier == block.threads.size()) {
    block.at_barrier = 0;
    for (Thread& released : block.threads) scheduler.make_ready(released);
  }
  thread.fibre->suspend();
}

void open_cluster_barrier(Cluster& cluster) {
  const std::size_t threads = cluster.blocks.size() * cluster.blocks[0]->threads.size();
  if (cluster.arrived == 0 || cluster.arrived + cluster.exited < threads) return;
  cluster.arrived = 0;
  ++cluster.barriers;
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.state == State::at_cluster_barrier) scheduler.make_ready(thread);
    }
  }
}

void cluster_arrive(Place place) {
  Thread& thread = running_thread();
  if (thread.has_arrived) scheduler.fault("it arrives at the cluster's barrier twice without a wait between", place);
  Cluster& cluster = *thread.block->cluster;
  thread.has_arrived = true;
  thread.arrival = cluster.barriers;
  ++cluster.arrived;
  open_cluster_barrier(cluster);
  scheduler.maybe_preempt();
}

void cluster_wait(Place place) {
  Thread& thread = running_thread();
  if (!thread.has_arrived) scheduler.fault("it waits at the cluster's barrier without having arrived", place);
  thread.has_arrived = false;
  if (thread.block->cluster->barriers != thread.arrival) return scheduler.maybe_preempt();
  thread.place = place;
  thread.state = State::at_cluster_barrier;
  thread.fibre->suspend();
}

void grid_barrier(Place place) { scheduler.wait_for_grid(place); }

void wait_for_earlier_launches() { running_thread().waits_for_launches = false; }

unsigned cluster_rank() { return running_thread().block->rank; }
unsigned cluster_blocks() { return static_cast<unsigned>(running_thread().block->cluster->blocks.size()); }

void* cluster_shared(const void* address, unsigned rank, Place place) {
  const Block& own = *running_thread().block;
  if (rank >= own.cluster->blocks.size()) {
    scheduler.fault("the cluster has no block of rank " + std::to_string(rank), place);
  }
  const Block& block = *own.cluster->blocks[rank];
  if (block.exited == block.threads.size()) {
    scheduler.fault("the shared memory of " + name(block) + " is gone: all its threads have exited", place);
  }
  return block.shared->data() + (static_cast<const unsigned char*>(address) - own.shared->data());
}

void sleep(Place place) {
  running_thread().place = place;
  scheduler.sleep();
}

void note_write() { scheduler.note_write(); }

std::uint64_t warp_operation(const WarpRequest& request, Place place) {
  Thread& thread = running_thread();
  Warp& warp = *thread.warp;
  thread.request = request;
  thread.place = place;
  thread.state = State::at_warp_operation;
  check_request(thread, place);
  warp.waiting |= 1u << thread.lane();
  if ((warp.waiting & request.mask) == request.mask && all_here(thread)) {
    resolve(*thread.block, warp, request.mask);
    warp.waiting &= ~request.mask;
    for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
      if (request.mask >> lane & 1) scheduler.make_ready(thread.block->thread(warp, lane));
    }
  }
  thread.fibre->suspend();
  return thread.result;
}

void check_exit(Thread& thread) {
  const Block& block = *thread.block;
  if (block.at_barrier == 0 && thread.warp->waiting == 0) return;
  const Thread* waiting = find_thread(block, [&](const Thread& other) {
    if (other.state == State::at_barrier) return true;
    return other.state == State::at_warp_operation && other.warp == thread.warp &&
           (other.request.mask >> thread.lane() & 1);
  });
  if (waiting) fault_barrier(*waiting, thread);
}

std::string deadlock(const Block& block) {
  const auto in = [&](State state) { return find_thread(block, [=](const Thread& t) { return t.state == state; }); };
  const Thread* waiting = in(State::at_warp_operation);
  if (!waiting) {  // a block's barrier alone opens, or is reported when a thread exits
    const Thread* asleep = in(State::asleep);
    if (!asleep) asleep = in(State::at_cluster_barrier);
    if (!asleep) asleep = in(State::at_grid_barrier);
    if (!asleep) return {};
    return name(*asleep) + ": deadlock: it " + standing(*asleep);
  }
  const Thread* other = find_thread(block, [&](const Thread& t) {
    return t.warp == waiting->warp && (waiting->request.mask >> t.lane() & 1) &&
           !(t.state == State::at_warp_operation && t.request.mask == waiting->request.mask &&
             same_place(t.place, waiting->place));
  });
  std::string words = name(*waiting) + ": deadlock: it " + standing(*waiting);
  if (other) words += " for " + lane_name(*other) + ", which " + standing(*other);
  return words;
}

}  // namespace cuda_on_cpu
