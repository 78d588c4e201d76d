// The interface between the parts of the planner: which teams slices can have, and the time of a plan by a model.
#pragma once

#include "plan.h"

namespace bn_ext::cuda {

constexpr int64_t kMostWaves = 4;     // the most waves of blocks that are considered
constexpr int kMinRowsPerThread = 4;  // rows that a thread reads at once

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the layout of slices and threads as a plan of the multi-kernel path. If planes are narrow, slices are at
// least `line` bytes wide.
Plan plan_with_slices(const Request& request, int line, const Machine& machine);

// The most rows per thread that a team can keep of slices with this layout if two blocks share a multiprocessor; 0 if
// no row fits.
int64_t most_kept_rows(const Plan& layout, const Request& request, const Machine& machine);

// Returns `layout` with teams of a kind that have `segments` blocks each, in a grid sometimes fewer. The plan has no
// teams (kNone) if the machine or the layout does not allow these.
Plan with_teams(Plan layout, Team team, int64_t segments, const Request& request, const Machine& machine);

// Returns the plan with the fastest teams for this layout by time_of, or one without teams (kNone) if none fit.
Plan best_teams(const Plan& layout, const Request& request, const Machine& machine);

// Returns the faster one of two plans with teams, or the only one that has teams.
Plan faster_teams(const Plan& a, const Plan& b, const Request& request, const Machine& machine);

// Returns the time of a pass in nanoseconds, by the model of plan_teams.cpp.
int64_t time_of(const Plan& plan, const Request& request, const Machine& machine);

}  // namespace bn_ext::cuda
