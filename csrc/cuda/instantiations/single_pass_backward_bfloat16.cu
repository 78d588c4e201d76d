#include "../single_pass_backward.cuh"

template struct bn_ext::cuda::SinglePassBackward<__nv_bfloat16>;
