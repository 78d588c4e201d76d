// Between the planner's parts: teams of blocks for the slices that it has chosen.
#pragma once

#include "plan.h"

namespace bn_ext::cuda {

constexpr int64_t kMostWaves = 4;     // of blocks, that are considered
constexpr int kMinRowsPerThread = 4;  // what a thread reads at once

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The plan of the teams that are done first, of those that keep a slice on chip, all of it or else what fits beside
// other blocks, enough to hide each other's barriers. None of this is measured. `general` if there are no such teams.
Plan choose_team(const Plan& general, int tensors, int value_bytes, const Machine& machine);

// How teams come to read while others write.
void choose_overlap(Plan& plan, const Request& request, const Machine& machine);

}  // namespace bn_ext::cuda
