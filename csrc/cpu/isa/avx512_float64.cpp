#define BN_EXT_TYPE double
#include "avx512.inl"
