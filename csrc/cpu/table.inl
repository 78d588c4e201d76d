// The table of this instruction set's functions: all that isa_*.cpp needs to include, once, in its namespace.
#include "rows.inl"

template <typename T>
static Kernels<T> kernels_of() {
  return {{plane_moments<T>, plane_apply<T>, plane_grad_sums<T>, plane_grad_input<T>},
          {row_moments<T>, row_apply<T>, row_grad_sums<T>, row_grad_input<T>}};
}

static KernelTables all_kernels() {
  return {kernels_of<float>(), kernels_of<double>(), kernels_of<Half>(), kernels_of<BFloat16>()};
}

#undef BN_EXT_INLINE
#undef BN_EXT_LAMBDA
