// The phases of a slice in the single-pass kernels, and the layout of the times at which blocks reach them, in a build
// with BN_EXT_PHASE_CLOCK. No release build defines that macro; lab/ reads the times.
#pragma once

#include <cstdint>

namespace bn_ext::cuda {

// In the order in which the first thread of a block reaches them.
enum class Phase : int {
  kStart,         // the slice begins
  kFetchIssued,   // the copies of the first stage are issued
  kFetched,       // the first group of rows has arrived
  kSummed,        // the block's own sums are published
  kFirstBarrier,  // the sums of all blocks are published
  kCoefficients,  // the coefficients of the block's assigned channels are published
  kGathered,      // the coefficients of the whole slice are available
  kWritten,       // the last store is issued; 0 if no result is wanted
};
constexpr int kPhases = 8;

// The clocked blocks are 0, 1, 131 and 132. Blocks 0 and 1 belong to one team if teams have several blocks. An H200 has
// 132 multiprocessors, so 132 is the first block beyond one per multiprocessor.
constexpr int kClocks = 4;
constexpr int clocked_block(int clock) { return clock < 2 ? clock : 129 + clock; }
constexpr int kClockedSlices = 4;  // the first slices of such a block

// Nanoseconds of %globaltimer; 0 if the phase was not reached.
struct PhaseTimes {
  uint64_t at[kClocks][kClockedSlices][kPhases];
};

}  // namespace bn_ext::cuda
