#include "../backward.cuh"

template struct bn_ext::cuda::MultiKernelBackward<float>;
