#define BN_EXT_TYPE Half
#include "avx2.inl"
