#define BN_EXT_TYPE double
#include "baseline.inl"
