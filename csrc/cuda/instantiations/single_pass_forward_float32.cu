#include "../single_pass_forward.cuh"

template struct bn_ext::cuda::SinglePassForward<float>;
