// Fibres: functions on stacks of their own that the scheduler enters and that come back when they wait.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace cuda_on_cpu {

// One stack. It runs `body` once per use: entered by resume(), it comes back by suspend() or when body has returned.
class Fibre {
 public:
  Fibre(void (*body)(), bool guard_page);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // On the main stack: run the fibre until it suspends or body has returned.
  void resume();

  // On the fibre's stack: go back to where it was resumed.
  void suspend();

  // On the main stack: forget what it was doing. Nothing on its stack is destroyed.
  void abandon();

 private:
  static void enter();

  void (*body_)();
  unsigned char* stack_;
  bool started_ = false;
  jmp_buf context_;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// Fibres at rest. The last one back is the first one out, so that few stacks stay in the caches.
class FibrePool {
 public:
  explicit FibrePool(void (*body)()) : body_(body) {}
  Fibre* take();
  void give_back(Fibre* fibre) { resting_.push_back(fibre); }

 private:
  void (*body_)();
  std::vector<std::unique_ptr<Fibre>> all_;
  std::vector<Fibre*> resting_;
};

}  // namespace cuda_on_cpu
