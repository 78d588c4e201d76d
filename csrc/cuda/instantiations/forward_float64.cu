#include "../forward.cuh"

template struct bn_ext::cuda::MultiKernelForward<double>;
