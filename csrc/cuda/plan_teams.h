// Between the planner's parts: the teams that there can be for slices, and how long a plan takes by a model.
#pragma once

#include "plan.h"

namespace bn_ext::cuda {

constexpr int64_t kMostWaves = 4;     // of blocks, that are considered
constexpr int kMinRowsPerThread = 4;  // what a thread reads at once

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How slices lie in the tensor and threads in a slice, if slices are `line` bytes at least where planes are narrow; as
// a plan of three kernels.
Plan plan_with_slices(const Request& request, int line, const Machine& machine);

// The rows that each thread of a team can keep of slices laid out like this, beside another block on its
// multiprocessor, at most; 0 if not one.
int64_t most_kept_rows(const Plan& layout, const Request& request, const Machine& machine);

// `layout` with teams of a kind and of so many blocks, or for a grid a few less; of kNone where the machine or the
// layout has no such teams.
Plan with_teams(Plan layout, Team team, int64_t segments, const Request& request, const Machine& machine);

// The best of all teams for slices laid out like this, by time_of; kNone if there is none.
Plan best_teams(const Plan& layout, const Request& request, const Machine& machine);

// The one that takes less time, of plans with teams; that with teams if the other one has none.
Plan faster_teams(const Plan& a, const Plan& b, const Request& request, const Machine& machine);

// How long a pass takes, in nanoseconds, by the model of plan_teams.cpp.
int64_t time_of(const Plan& plan, const Request& request, const Machine& machine);

}  // namespace bn_ext::cuda
