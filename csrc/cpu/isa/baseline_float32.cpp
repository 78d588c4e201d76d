#define BN_EXT_TYPE float
#include "baseline.inl"
