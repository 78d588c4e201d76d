// When blocks of the single-pass kernels have come to which point of a slice, in a build with BN_EXT_PHASE_CLOCK: the
// phases, and the layout of the times. No release build has the macro; lab/ has what reads them.
#pragma once

#include <cstdint>

namespace bn_ext::cuda {

// In the order of a slice, as a block's first thread gets there.
enum class Phase : int {
  kStart,         // of the slice
  kFetchIssued,   // the first stage of its rows is on its way
  kFetched,       // the first group of rows is there
  kSummed,        // the block's own sums are left for its team
  kFirstBarrier,  // and all of the team's are there
  kCoefficients,  // those of the block's own channels are left for its team
  kGathered,      // and all of the slice's are there
  kWritten,       // the last store is issued; 0 if no result is wanted
};
constexpr int kPhases = 8;

// 0 and 1 belong to one team if it has several blocks; an H200 has 132 multiprocessors, and 132 is the first block
// beyond.
constexpr int kClocks = 4;
constexpr int clocked_block(int clock) { return clock < 2 ? clock : 129 + clock; }
constexpr int kClockedSlices = 4;  // the first ones of such a block

// Nanoseconds of %globaltimer; 0: not reached.
struct PhaseTimes {
  uint64_t at[kClocks][kClockedSlices][kPhases];
};

}  // namespace bn_ext::cuda
