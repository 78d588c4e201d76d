// Fibres by ucontext to create one and _setjmp/_longjmp to switch, which costs some 20 ns and needs no library.

// glibc's checked longjmp takes another stack for an error.
#undef _FORTIFY_SOURCE

#include "fibre.h"

#include <sys/mman.h>

#include <new>

#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;  // reserved; only pages that are touched cost memory
constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kGuardedStacks = 8192;  // each guard page is a mapping, of which Linux allows 65,530

jmp_buf main_context;
Fibre* running = nullptr;

// Of the main stack, for AddressSanitizer.
void* main_fake_stack = nullptr;
const void* main_stack = nullptr;
std::size_t main_stack_bytes = 0;

}  // namespace

Fibre::Fibre(void (*body)(), bool guard_page) : body_(body) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<unsigned char*>(memory);
  if (guard_page) mprotect(stack_, kGuardBytes, PROT_NONE);
}

Fibre::~Fibre() {
  unpoison(stack_, kStackBytes);
  munmap(stack_, kStackBytes);
}

void Fibre::resume() {
  running = this;
  if (_setjmp(main_context) == 0) {
    start_switch(&main_fake_stack, stack_ + kGuardBytes, kStackBytes - kGuardBytes);
    if (started_) _longjmp(context_, 1);
    started_ = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_ + kGuardBytes;
    context.uc_stack.ss_size = kStackBytes - kGuardBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
  finish_switch(main_fake_stack, nullptr, nullptr);
}

void Fibre::suspend() {
  if (_setjmp(context_) == 0) {
    start_switch(&fake_stack_, main_stack, main_stack_bytes);
    _longjmp(main_context, 1);
  }
  finish_switch(fake_stack_, &main_stack, &main_stack_bytes);
}

void Fibre::abandon() {
  started_ = false;
  unpoison(stack_ + kGuardBytes, kStackBytes - kGuardBytes);  // its frames never returned
}

void Fibre::enter() {
  finish_switch(nullptr, &main_stack, &main_stack_bytes);
  for (Fibre* self = running;;) {
    self->body_();
    self->suspend();
  }
}

Fibre* FibrePool::take() {
  if (resting_.empty()) {
    all_.push_back(std::make_unique<Fibre>(body_, all_.size() < kGuardedStacks));
    return all_.back().get();
  }
  Fibre* fibre = resting_.back();
  resting_.pop_back();
  return fibre;
}

}  // namespace cuda_on_cpu
