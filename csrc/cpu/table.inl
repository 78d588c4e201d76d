// The table of this instruction set's functions. isa/*.inl include only this file, once, inside their namespace.
#include "rows.inl"

template <typename T>
Kernels<T> table() {
  return {{plane_moments<T>, plane_apply<T>, plane_grad_sums<T>, plane_grad_input<T>},
          {row_moments<T>, row_apply<T>, row_grad_sums<T>, row_grad_input<T>}};
}

template Kernels<BN_EXT_TYPE> table<BN_EXT_TYPE>();

#undef BN_EXT_INLINE
#undef BN_EXT_LAMBDA
