// The device's functions for ctypes (device.py). Each returns null or what went wrong.
#include "c_api.h"

#include "cuda_on_cpu.h"

using cuda_on_cpu::reported;

extern "C" {

const char* cuda_on_cpu_set_machine(std::int64_t resident_blocks,
                                    std::int64_t shared_bytes,
                                    std::int64_t multiprocessors) {
  return reported([&] {
    cuda_on_cpu::set_machine(
        {static_cast<int>(resident_blocks), static_cast<std::size_t>(shared_bytes), static_cast<int>(multiprocessors)});
  });
}

const char* cuda_on_cpu_set_order(std::int64_t seed, std::int64_t policy) {
  return reported(
      [&] { cuda_on_cpu::set_order({static_cast<std::uint64_t>(seed), static_cast<cuda_on_cpu::Policy>(policy)}); });
}

const char* cuda_on_cpu_add_buffer(const char* name,
                                   std::int64_t kind,
                                   std::int64_t bytes,
                                   std::int64_t misalignment,
                                   std::int64_t contents,
                                   const void* source,
                                   void** address) {
  return reported([&] {
    *address = cuda_on_cpu::add_buffer({name,
                                        static_cast<cuda_on_cpu::Kind>(kind),
                                        static_cast<std::size_t>(bytes),
                                        static_cast<std::size_t>(misalignment),
                                        static_cast<cuda_on_cpu::Contents>(contents),
                                        source});
  });
}

const char* cuda_on_cpu_counters(std::int64_t kind, cuda_on_cpu::Counters* counters) {
  return reported([&] { *counters = cuda_on_cpu::counters(static_cast<cuda_on_cpu::Kind>(kind)); });
}

const char* cuda_on_cpu_launch_count(std::int64_t* count) {
  return reported([&] { *count = cuda_on_cpu::launch_count(); });
}

const char* cuda_on_cpu_refuse(std::int64_t call, std::int64_t granted, std::int64_t refused, std::int64_t error) {
  return reported(
      [&] { cuda_on_cpu::refuse(static_cast<cuda_on_cpu::Call>(call), {granted, refused, static_cast<int>(error)}); });
}

const char* cuda_on_cpu_last_error(std::int64_t* error) {
  return reported([&] { *error = cuda_on_cpu::last_error(); });
}

const char* cuda_on_cpu_set_capture(std::int64_t captures, std::int64_t driver_version) {
  return reported([&] { cuda_on_cpu::set_capture(captures != 0, static_cast<int>(driver_version)); });
}

// One name a line; valid until the next call.
const char* cuda_on_cpu_calls(const char** names) {
  static std::string lines;
  return reported([&] {
    lines.clear();
    for (const std::string& name : cuda_on_cpu::calls()) lines += name + "\n";
    *names = lines.c_str();
  });
}

const char* cuda_on_cpu_check_written(const void* buffer, std::int64_t element_bytes) {
  return reported([&] { cuda_on_cpu::check_written(buffer, static_cast<std::size_t>(element_bytes)); });
}

const char* cuda_on_cpu_check_guards() { return reported(cuda_on_cpu::check_guards); }
const char* cuda_on_cpu_reset_counters() { return reported(cuda_on_cpu::reset_counters); }
const char* cuda_on_cpu_clear_calls() { return reported(cuda_on_cpu::clear_calls); }
const char* cuda_on_cpu_reset() { return reported(cuda_on_cpu::reset); }

}  // extern "C"
