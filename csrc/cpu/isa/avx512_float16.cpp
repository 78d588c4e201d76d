#define BN_EXT_TYPE Half
#include "avx512.inl"
