#define BN_EXT_TYPE Half
#include "baseline.inl"
