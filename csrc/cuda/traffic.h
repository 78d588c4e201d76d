// What a pass moves to and from memory, told from its plan: by the kernels' own rules, without running them.
#pragma once

#include <cstdint>

#include "plan.h"

namespace bn_ext::cuda {

// Bytes of activation tensors and masks. Not counted: vectors of channels and workspace, a few per cent; a dy of one
// value; and channels that are done again in double, which depends on their values.
struct Traffic {
  int64_t read;
  int64_t written;
  int64_t mask_read;     // of `read`; a whole mask is (numel + 7) / 8 bytes
  int64_t mask_written;  // of `written`
  int launches;          // of kernels

  constexpr int64_t bytes() const { return read + written; }
};

// `plan` is that of the same params, or of params that are alike but for the machine.
Traffic expected_traffic(const ForwardParams& p, const Plan& plan);
Traffic expected_traffic(const BackwardParams& p, const Plan& plan);

}  // namespace bn_ext::cuda
