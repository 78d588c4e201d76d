// The user's choices about a machine, from environment variables (docs/install.md).
#include <string_view>

#include "plan.h"

namespace bn_ext::cuda {
namespace {

bool tune_one(std::string_view name, std::string_view value, Machine& machine) {
  const auto choose = [&](auto& option, std::initializer_list<std::string_view> values) {
    int number = 0;
    for (const std::string_view known : values) {
      if (known == value) {
        option = static_cast<std::decay_t<decltype(option)>>(number);
        return true;
      }
      ++number;
    }
    return false;
  };
  if (name == "stagger") return choose(machine.staggers, {"0", "1"});
  if (name == "half_chip") return choose(machine.half_chip, {"0", "1", "always"});
  if (name == "evict_last") return choose(machine.evict_last, {"0", "1"});
  if (name == "keep_results") return choose(machine.keep_results, {"0", "1"});
  if (name == "three_kernels") return choose(machine.three_kernels, {"0", "1"});
  return name == "prefetch" && choose(machine.prefetched_quarters, {"0", "0.25", "0.5", "0.75", "1"});
}

}  // namespace

bool limit_teams(const char* largest, Machine& machine) {
  const std::string_view name = largest;
  if (name == "grid") return true;
  machine.cooperative = false;
  if (name == "cluster") return true;
  machine.clusters = false;
  if (name == "block") return true;
  machine.shared_bytes = 0;
  return name == "none";
}

bool choose_pdl(const char* choice, Machine& machine) {
  const std::string_view name = choice;
  if (name == "0") machine.pdl = false;
  return name == "0" || name == "1";
}

bool tune(const char* choices, Machine& machine) {
  std::string_view rest = choices;
  while (!rest.empty()) {
    const std::string_view choice = rest.substr(0, rest.find(','));
    const size_t equals = choice.find('=');
    if (equals == std::string_view::npos) return false;
    if (!tune_one(choice.substr(0, equals), choice.substr(equals + 1), machine)) return false;
    rest.remove_prefix(choice.size() < rest.size() ? choice.size() + 1 : rest.size());
  }
  return true;
}

}  // namespace bn_ext::cuda
