#define BN_EXT_TYPE BFloat16
#include "avx2.inl"
