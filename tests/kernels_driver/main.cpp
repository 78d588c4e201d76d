// All of csrc/cuda's kernels on small tensors, without torch, compared with more exact results from the host: quick
// enough for compute-sanitizer's tools.
//
//   tests/kernels_driver/build.sh PROGRAM    PROGRAM    compute-sanitizer --tool racecheck PROGRAM
//
// Prints a line for each case that is wrong, and in the end how many there were; fails too where a kernel that is
// compiled, or a way to take it (coverage.h), was never run. Options:
//   --list        the cases' names
//   --only TEXT   only cases in whose name this is; may be given several times, and then all must be
//   --seconds S   begin no case after so many; exit status 3 if there were more and all is right so far
//   --verbose     say which case begins, and which kernels it took
//   --unwritten   leave results and workspace as cudaMalloc gives them, for initcheck; else they start as poison
//   --spoil NAME  change a value of the result of this name before it is looked at: every case that has it must fail
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>

#include "cases.h"
#include "coverage.h"
#include "device.h"
#include "run.h"

namespace kernels_driver {
namespace {

constexpr int kIncomplete = 3;  // exit status: what was run is right, but --seconds did not do for all

struct Options {
  bool list = false;
  bool verbose = false;
  double seconds = 0;  // 0: no end
  std::vector<std::string> only;
  RunOptions run;
};

bool parse(int count, char** words, Options& options) {
  for (int i = 1; i < count; ++i) {
    const auto is = [&](const char* name) { return std::strcmp(words[i], name) == 0; };
    const bool has_value = i + 1 < count;
    if (is("--list")) {
      options.list = true;
    } else if (is("--verbose")) {
      options.verbose = true;
    } else if (is("--unwritten")) {
      options.run.unwritten = true;
    } else if (is("--only") && has_value) {
      options.only.push_back(words[++i]);
    } else if (is("--seconds") && has_value) {
      options.seconds = std::atof(words[++i]);
    } else if (is("--spoil") && has_value) {
      options.run.spoil = words[++i];
    } else {
      std::fprintf(stderr, "unknown or incomplete option: %s; main.cpp lists them\n", words[i]);
      return false;
    }
  }
  return true;
}

bool is_chosen(const std::string& name, const Options& options) {
  for (const std::string& text : options.only) {
    if (name.find(text) == std::string::npos) return false;
  }
  return true;
}

// Prints what there is but was never run; how many that are.
int print_never_run(const char* what, const std::set<std::string>& all, const std::set<std::string>& run) {
  int missing = 0;
  for (const std::string& name : all) {
    if (run.count(name) > 0) continue;
    std::printf("never run: %s\n", name.c_str());
    ++missing;
  }
  std::printf("%d of %d %s were run\n", static_cast<int>(all.size()) - missing, static_cast<int>(all.size()), what);
  return missing;
}

class Program {
 public:
  explicit Program(const Options& options) : options_(options), device_(ask_machine()) {}

  int run_all() {
    const auto start = std::chrono::steady_clock::now();
    int left = 0;
    for (const Case& c : all_cases(device_)) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      if (!is_chosen(c.name(), options_)) continue;
      if (options_.list) {
        std::printf("%s\n", c.name().c_str());
      } else if (options_.seconds > 0 && spent.count() > options_.seconds) {
        ++left;
      } else if (!run_one(c)) {
        break;
      }
    }
    return options_.list ? 0 : summary(left);
  }

 private:
  // False where no other case could be run after it.
  bool run_one(const Case& c) {
    if (options_.verbose) std::printf("%s\n", c.name().c_str());
    ++cases_;
    Outcome outcome;
    bool device_is_well = true;
    try {
      outcome = run(c, device_, options_.run);
    } catch (const std::exception& error) {
      outcome.wrong.push_back(error.what());
      device_is_well = cudaDeviceSynchronize() == cudaSuccess;
    }
    wrong_ += !outcome.wrong.empty();
    for (const std::string& sentence : outcome.wrong) {
      sentences_.push_back("wrong: " + c.name() + ": " + sentence);
      std::printf("%s\n", sentences_.back().c_str());
    }
    for (const Launched& launched : outcome.launched) {
      if (options_.verbose) std::printf("    %s\n", launched.kernel.c_str());
      kernels_.insert(launched.kernel);
      ways_.insert(launched.ways.begin(), launched.ways.end());
    }
    if (!device_is_well) std::printf("the device runs no more kernels after that\n");
    return device_is_well;
  }

  int summary(int left) const {
    int missing = 0;
    if (options_.only.empty()) {
      missing += print_never_run("kernels", all_kernels(), kernels_);
      missing += print_never_run("ways to take them", all_ways(device_), ways_);
    }
    if (!device_.clusters) std::printf("left out: clusters, which this device or this build has not\n");
    if (!device_.cooperative) std::printf("left out: cooperative grids, which this device has not\n");
    if (options_.verbose) {  // once more, for who reads the end first
      for (const std::string& sentence : sentences_) std::printf("%s\n", sentence.c_str());
    }
    if (left > 0) std::printf("%d cases were not begun after %g s\n", left, options_.seconds);
    std::printf("%d of %d cases are right\n", cases_ - wrong_, cases_);
    if (wrong_ > 0 || cases_ == 0) return 1;
    if (left > 0) return kIncomplete;
    return missing > 0 ? 1 : 0;
  }

  const Options& options_;
  bn_ext::cuda::Machine device_;
  int cases_ = 0;
  int wrong_ = 0;
  std::vector<std::string> sentences_;
  std::set<std::string> kernels_;
  std::set<std::string> ways_;
};

}  // namespace
}  // namespace kernels_driver

int main(int count, char** words) {
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 16);  // what is printed stands beside what a tool prints
  kernels_driver::Options options;
  if (!kernels_driver::parse(count, words, options)) return 2;
  try {
    return kernels_driver::Program(options).run_all();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
