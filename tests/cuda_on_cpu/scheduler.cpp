// Runs a launch: blocks come into the machine's slots, their threads run as the order says, until none is left.
#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <exception>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

unsigned char* cuda_on_cpu_shared_memory() { return cuda_on_cpu::running_thread().block->shared->data(); }

namespace cuda_on_cpu {

Scheduler scheduler;
Thread* current = nullptr;

namespace {

uint3 unravel(std::uint64_t number, dim3 size) {
  return {static_cast<unsigned>(number % size.x),
          static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

std::string words(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

}  // namespace

std::string name(const Block& block) { return "block " + words(block.index); }
std::string name(const Thread& thread) { return "thread " + words(thread.index); }
std::string name(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

Scheduler::Scheduler() : fibres_(run_thread) {}

void Scheduler::run(const Launch& launch, const Machine& machine, const Order& order, Memory& memory) {
  Ordering ordering(order, launch);
  launch_ = &launch;
  memory_ = &memory;
  ordering_ = &ordering;
  started_ = writes_ = 0;
  at_grid_barrier_.clear();
  blockDim = launch.block;
  gridDim = launch.grid;
  slots_.clear();
  const auto slots = std::min<std::uint64_t>(machine.resident_blocks / launch.cluster_blocks, launch.clusters());
  for (std::uint64_t i = 0; i < slots; ++i) {
    slots_.push_back(std::make_unique<Cluster>());
    start_cluster(*slots_.back());
  }
  while (fault_.empty()) {
    if (!asleep_.empty() && ordering.preempts()) wake_sleepers(true);
    if (ready_.empty()) wake_sleepers(false);
    if (ready_.empty()) break;
    std::pop_heap(ready_.begin(), ready_.end(), [](const Ready& a, const Ready& b) { return a.key > b.key; });
    Thread* thread = ready_.back().thread;
    ready_.pop_back();
    step(*thread);
  }
  for (std::size_t i = 0; i < resident_.size() && fault_.empty(); ++i) {
    const std::string reason = deadlock(*resident_[i]);
    if (!reason.empty()) fault_ = name(*resident_[i]) + ", " + reason;
  }
  if (fault_.empty() && !resident_.empty()) fault_ = "deadlock: no thread can go on";
  if (!resident_.empty() && started_ < launch.clusters() && ready_.empty()) {
    fault_ += " (blocks that have not started might: is the launch to be cooperative?)";
  }
  if (fault_.empty()) return;
  const Fault fault("launch " + std::to_string(launch.number) + ", " + fault_);
  abandon();
  throw fault;
}

void Scheduler::start_cluster(Cluster& cluster) {
  const std::uint64_t first = ordering_->cluster(started_++) * launch_->cluster_blocks;
  cluster.arrived = cluster.exited = 0;
  cluster.barriers = 0;
  cluster.running = launch_->cluster_blocks;
  while (cluster.blocks.size() < cluster.running) cluster.blocks.push_back(std::make_unique<Block>());
  for (unsigned rank = 0; rank < cluster.running; ++rank) {
    Block& block = *cluster.blocks[rank];
    block.cluster = &cluster;
    block.rank = rank;
    start_block(block, first + rank);
  }
}

void Scheduler::start_block(Block& block, std::uint64_t number) {
  block.number = number;
  block.index = unravel(block.number, launch_->grid);
  block.at_barrier = block.exited = 0;
  block.priority = ordering_->priority();
  if (!block.shared) block.shared = std::make_unique<GuardedMemory>(launch_->shared_bytes);
  block.shared->fill_poison();
  const unsigned threads = launch_->threads();
  block.warps.resize((threads + kWarpThreads - 1) / kWarpThreads);
  for (unsigned i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.number = i;
    const unsigned lanes = std::min(threads - i * kWarpThreads, kWarpThreads);
    warp.lanes = lanes == kWarpThreads ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.exited = 0;
    warp.priority = ordering_->priority();
    warp.sectors.resize(memory_->streams());
  }
  block.threads.resize(threads);
  resident_.push_back(&block);
  for (unsigned rank = 0; rank < threads; ++rank) {
    Thread& thread = block.threads[rank];
    thread.index = unravel(rank, launch_->block);
    thread.rank = rank;
    thread.block = &block;
    thread.warp = &block.warps[rank / kWarpThreads];
    thread.fibre = nullptr;
    thread.accesses.assign(memory_->streams(), 0);
    thread.has_arrived = false;
    thread.waits_for_launches = launch_->uses_pdl;
    thread.writes_seen = ~std::uint64_t{0};
    thread.copies.assign(1, {});
    make_ready(thread);
  }
}

void Scheduler::step(Thread& thread) {
  if (!thread.fibre) thread.fibre = fibres_.take();
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  current = &thread;
  thread.fibre->resume();
  current = nullptr;
  if (thread.state == State::exited && fault_.empty()) finish_thread(thread);
}

// The body of every fibre.
void Scheduler::run_thread() {
  std::string sentence;
  try {
    scheduler.launch_->kernel(scheduler.launch_->arguments);
  } catch (const std::exception& error) {
    sentence = std::string("the kernel threw: ") + error.what();
  }
  if (!sentence.empty()) scheduler.fault(sentence);
  current->state = State::exited;
  check_exit(*current);
}

void Scheduler::finish_thread(Thread& thread) {
  fibres_.give_back(thread.fibre);
  thread.fibre = nullptr;
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  ++block.exited;
  Cluster& cluster = *block.cluster;
  if (thread.has_arrived && thread.arrival == cluster.barriers) --cluster.arrived;
  ++cluster.exited;
  open_cluster_barrier(cluster);
  warp.exited |= 1u << thread.lane();
  if (warp.exited == warp.lanes) memory_->count_sectors(warp.sectors);
  if (block.exited == block.threads.size()) finish_block(block);
}

void Scheduler::finish_block(Block& block) {
  const std::string damage = block.shared->damage();
  if (!damage.empty()) fault_ = name(block) + ": shared memory was written " + damage + " (guard zone changed)";
  if (block.cluster->running > 1) block.shared->fill_poison();  // for those of its cluster that still look at it
  resident_.erase(std::find(resident_.begin(), resident_.end(), &block));
  if (--block.cluster->running == 0 && started_ < launch_->clusters()) start_cluster(*block.cluster);
}

void Scheduler::abandon() {
  for (Block* block : resident_) {
    for (Thread& thread : block->threads) {
      if (!thread.fibre) continue;
      thread.fibre->abandon();
      fibres_.give_back(thread.fibre);
    }
  }
  resident_.clear();
  ready_.clear();
  asleep_.clear();
  fault_.clear();
}

void Scheduler::make_ready(Thread& thread) {
  thread.state = State::ready;
  ready_.push_back({ordering_->key(thread), &thread});
  std::push_heap(ready_.begin(), ready_.end(), [](const Ready& a, const Ready& b) { return a.key > b.key; });
}

void Scheduler::maybe_preempt() {
  if (!ordering_->preempts()) return;
  make_ready(*current);
  current->fibre->suspend();
}

void Scheduler::sleep() {
  current->state = State::asleep;
  asleep_.push_back(current);
  current->fibre->suspend();
}

void Scheduler::wait_for_grid(Place place) {
  if (!launch_->cooperative) fault("it waits for the grid, whose launch is not cooperative", place);
  current->place = place;
  current->state = State::at_grid_barrier;
  at_grid_barrier_.push_back(current);
  if (at_grid_barrier_.size() == launch_->blocks() * launch_->threads()) {
    for (Thread* released : at_grid_barrier_) make_ready(*released);
    at_grid_barrier_.clear();
  }
  current->fibre->suspend();
}

// All that sleep, or those for whom something may have changed.
void Scheduler::wake_sleepers(bool all) {
  const auto stays = [&](const Thread* thread) { return !all && thread->writes_seen == writes_; };
  const auto first = std::stable_partition(asleep_.begin(), asleep_.end(), stays);
  for (auto i = first; i != asleep_.end(); ++i) {
    (*i)->writes_seen = writes_;
    make_ready(**i);
  }
  asleep_.erase(first, asleep_.end());
}

void Scheduler::fault(const std::string& sentence, Place place) {
  fault_ = name(*current->block) + ", " + name(*current);
  if (place.file) fault_ += ", " + name(place);
  fault_ += ": " + sentence;
  for (;;) current->fibre->suspend();  // once: it is abandoned
}

}  // namespace cuda_on_cpu
