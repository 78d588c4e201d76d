#include "../backward.cuh"

template struct bn_ext::cuda::MultiKernelBackward<__nv_bfloat16>;
