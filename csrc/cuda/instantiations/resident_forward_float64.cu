#include "../resident_forward.cuh"

template struct bn_ext::cuda::ResidentForward<double>;
