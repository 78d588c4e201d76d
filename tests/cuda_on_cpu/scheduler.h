// Threads, warps and blocks of the launch that runs, and the scheduler that chooses which thread goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "fibre.h"
#include "include/device_operations.h"
#include "memory.h"

namespace cuda_on_cpu {

constexpr unsigned kWarpThreads = 32;

enum class State { ready, asleep, at_barrier, at_cluster_barrier, at_grid_barrier, at_warp_operation, exited };

struct Warp;
struct Block;
struct Cluster;

// A copy to shared memory that has not run yet.
struct PendingCopy {
  void* to;
  const void* from;
  std::size_t bytes;
};
using CopyGroup = std::vector<PendingCopy>;

struct Thread {
  uint3 index;
  unsigned rank;  // within the block, x fastest
  Block* block;
  Warp* warp;
  Fibre* fibre;  // from its first step to its exit
  State state;
  Place place;          // where it waits
  WarpRequest request;  // of the warp operation at which it waits
  std::uint64_t result;
  AccessCounts accesses;
  bool has_arrived;               // at the cluster's barrier, without having waited since
  std::uint64_t arrival;          // which barrier of the cluster that is
  std::uint64_t writes_seen;      // the launch's writes when it woke last, and began to look for what it waits for
  bool waits_for_launches;        // earlier ones may still write
  std::vector<CopyGroup> copies;  // committed ones in the order of their groups, the last group is open

  unsigned lane() const { return rank % kWarpThreads; }
};

// Sets of lanes are masks.
struct Warp {
  unsigned number;  // within the block
  unsigned lanes;   // that exist
  unsigned waiting;
  unsigned exited;
  std::uint64_t priority;
  SectorRecords sectors;
};

// A block of a cluster.
struct Block {
  Cluster* cluster;
  unsigned rank;         // in the cluster
  std::uint64_t number;  // within the grid, x fastest
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned at_barrier;
  Place barrier_place;  // of those at the barrier
  unsigned exited;
  std::uint64_t priority;
  std::unique_ptr<GuardedMemory> shared;

  Thread& thread(const Warp& warp, unsigned lane) { return threads[warp.number * kWarpThreads + lane]; }
};

// Blocks that start together, in a slot of the machine: one where the launch does not ask for more.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned running;        // blocks
  unsigned arrived;        // threads, at the next barrier
  unsigned exited;         // threads
  std::uint64_t barriers;  // that have opened
};

struct Launch {
  std::int64_t number;
  dim3 grid;
  dim3 block;
  unsigned cluster_blocks;
  bool cooperative;
  bool uses_pdl;
  std::size_t shared_bytes;
  void (*kernel)(void*);
  void* arguments;

  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
  std::uint64_t clusters() const { return blocks() / cluster_blocks; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

// An order as numbers: of the threads that are ready, the one with the least key runs.
class Ordering {
 public:
  Ordering(const Order& order, const Launch& launch);
  std::uint64_t cluster(std::uint64_t turn) const;  // which cluster of the grid starts as turn-th
  std::uint64_t priority() { return random() >> 44; }
  std::uint64_t key(Thread& thread);  // drawn when the thread becomes ready
  bool preempts();  // whether a thread is interrupted at an access to global memory, a sleeping one wakes

 private:
  std::uint64_t random();

  Policy policy_;
  std::uint64_t clusters_;
  std::uint64_t state_;
  std::uint64_t step_;  // random orders take the clusters in steps of it, around the grid
  std::uint64_t start_;
};

class Scheduler {
 public:
  Scheduler();

  // On the main stack: runs a launch to its end, or throws its fault.
  void run(const Launch& launch, const Machine& machine, const Order& order, Memory& memory);

  // The thread may go on. Until then it has called suspend() of its fibre.
  void make_ready(Thread& thread);

  // On a thread's stack: lets others go first, now and then.
  void maybe_preempt();

  // On a thread's stack: lets others go first, until one has written.
  void sleep();
  void note_write() { ++writes_; }

  // On a thread's stack: waits for all threads of the grid.
  void wait_for_grid(Place place);

  // On a thread's stack: whether what may happen at any time happens now.
  bool hurries() { return ordering_->preempts(); }

  // On a thread's stack: ends the launch. The sentence is about this thread.
  [[noreturn]] void fault(const std::string& sentence, Place place = {nullptr, 0});

 private:
  struct Ready {
    std::uint64_t key;
    Thread* thread;
  };

  static void run_thread();
  void start_cluster(Cluster& cluster);
  void start_block(Block& block, std::uint64_t number);
  void wake_sleepers(bool all);
  void step(Thread& thread);
  void finish_thread(Thread& thread);
  void finish_block(Block& block);
  void abandon();

  FibrePool fibres_;
  std::vector<std::unique_ptr<Cluster>> slots_;
  std::vector<Block*> resident_;
  std::vector<Ready> ready_;  // a heap
  std::vector<Thread*> asleep_;
  std::string fault_;

  // Of the launch that runs.
  const Launch* launch_ = nullptr;
  Memory* memory_ = nullptr;
  Ordering* ordering_ = nullptr;
  std::uint64_t started_ = 0;  // clusters
  std::uint64_t writes_ = 0;   // to global memory
  std::vector<Thread*> at_grid_barrier_;
};

extern Scheduler scheduler;
extern Thread* current;  // null while no thread runs

inline Thread& running_thread() {
  if (!current) throw Fault("device code was called outside a kernel");
  return *current;
}

// In words, for faults.
std::string name(const Block& block);    // "block (0,0,0)"
std::string name(const Thread& thread);  // "thread (5,0,0)"
std::string name(Place place);           // "file.cu:12"

// Synchronisation's side of the scheduler's events.
void check_exit(Thread& thread);              // on the thread's stack, when the kernel has returned
void open_cluster_barrier(Cluster& cluster);  // if all its threads that are left have arrived
std::string deadlock(const Block& block);     // why none of its threads can go on; empty if this block is not why

}  // namespace cuda_on_cpu
