#include "../forward.cuh"

template struct bn_ext::cuda::MultiKernelForward<__nv_bfloat16>;
