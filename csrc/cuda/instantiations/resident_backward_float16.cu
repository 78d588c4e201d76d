#include "../resident_backward.cuh"

template struct bn_ext::cuda::ResidentBackward<__half>;
