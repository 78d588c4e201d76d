#define BN_EXT_TYPE BFloat16
#include "baseline.inl"
