#define BN_EXT_TYPE float
#include "avx512.inl"
