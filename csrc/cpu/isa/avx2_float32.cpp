#define BN_EXT_TYPE float
#include "avx2.inl"
