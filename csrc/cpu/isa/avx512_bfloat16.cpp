#define BN_EXT_TYPE BFloat16
#include "avx512.inl"
