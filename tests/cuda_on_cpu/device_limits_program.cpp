// The whole program of benchmarks/device_limits on the simulated device, for test_device_limits_program.py.
#include "host_runtime.h"
// Before the program, whose main has another name here.
#define main limits_main
#include "../../benchmarks/device_limits/limits.cu"
#undef main
#include "c_api.h"

extern "C" {

// One part; the lines go to a file.
const char* limits_program(const char* part, const char* file, int64_t spoils) {
  return cuda_on_cpu::reported([&] {
    spoils_copies = spoils != 0;
    std::FILE* const lines = std::fopen(file, "w");
    if (lines == nullptr) throw cuda_on_cpu::Fault("the file cannot be opened");
    std::FILE* const usual = stdout;
    stdout = lines;
    std::string seconds = "600", name = part;
    char* arguments[] = {nullptr, seconds.data(), name.data()};
    std::string wrong;
    try {
      if (limits_main(3, arguments) != 0) wrong = "the program failed";
    } catch (const cuda_on_cpu::Fault& fault) {
      wrong = fault.what();
    }
    stdout = usual;
    std::fclose(lines);
    if (!wrong.empty()) throw cuda_on_cpu::Fault(wrong);
  });
}

}  // extern "C"
