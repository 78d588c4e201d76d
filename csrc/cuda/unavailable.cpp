// The CUDA back-end of a build without CUDA kernels: raises an error with the reason.
#include <c10/util/Exception.h>

#include "batch_norm_cuda.h"

#ifndef BN_EXT_CUDA_REASON
#error "BN_EXT_CUDA_REASON must say why there are no CUDA kernels and how to get them; setup.py defines it"
#endif

namespace bn_ext::cuda {
namespace {

[[noreturn]] void fail() { TORCH_CHECK(false, "bn_ext cannot run on a cuda device: ", BN_EXT_CUDA_REASON); }

}  // namespace

void forward(const ForwardParams&, int) { fail(); }
void backward(const BackwardParams&, int) { fail(); }

}  // namespace bn_ext::cuda
