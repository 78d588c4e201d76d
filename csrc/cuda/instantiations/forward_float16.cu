#include "../forward.cuh"

template struct bn_ext::cuda::GeneralForward<__half>;
