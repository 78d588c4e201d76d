#define BN_EXT_TYPE double
#include "avx2.inl"
