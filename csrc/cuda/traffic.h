// The bytes that a pass moves to and from memory, computed from its plan without running it.
#pragma once

#include <cstdint>

#include "plan.h"

namespace bn_ext::cuda {

// Bytes of activation tensors and masks. Not counted are per-channel vectors and workspace (a few per cent), a dy of
// one value, and second reads of channels whose moments are computed again in double, which depend on the values.
struct Traffic {
  int64_t read;
  int64_t written;
  int64_t mask_read;     // of `read`; a whole mask is (numel + 7) / 8 bytes
  int64_t mask_written;  // of `written`
  int launches;          // of kernels

  constexpr int64_t bytes() const { return read + written; }
};

// `plan` must be a plan for the same params, for any machine.
Traffic expected_traffic(const ForwardParams& p, const Plan& plan);
Traffic expected_traffic(const BackwardParams& p, const Plan& plan);

}  // namespace bn_ext::cuda
