// Counts the values that each thread gets from the CPU back-end. csrc/cpu/batch_norm_cpu.cpp is compiled as it is, with
// the at::parallel_for of include/ and with kernels that count the values of their range instead of reading them.
//
// Each line of standard input is a case: N C S channels_last(0 or 1) dtype(float32 or bfloat16) pass threads; each line
// of standard output is its counts: values of all threads, values of the busiest thread.
#include <ATen/Parallel.h>

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include "../../csrc/cpu/batch_norm_cpu.h"
#include "../../csrc/cpu/cache.h"
#include "../../csrc/cpu/instruction_set.h"
#include "../../csrc/cpu/pages.h"

namespace bn_ext::cpu {
namespace {

int64_t sums(const PlaneRange& range) { return range.c_end - range.c_begin; }
int64_t sums(const RowRange& range) { return range.runs(); }

void count(const PlaneRange& r) { shares::counted += (r.c_end - r.c_begin) * (r.m_end - r.m_begin); }
void count(const RowRange& r) { shares::counted += (r.column_end - r.column_begin) * (r.row_end - r.row_begin); }

template <typename T, typename Range>
KernelsOf<T, Range> counting() {
  return {
      [](const Range& range, const T*, Moments* out) {
        count(range);
        std::fill_n(out, sums(range), Moments{0, 1});
      },
      [](const Range& range, const ApplyArguments<T>&) { count(range); },
      [](const Range& range, const GradArguments<T>&, GradSums* out) {
        count(range);
        std::fill_n(out, sums(range), GradSums{0, 0});
      },
      [](const Range& range, const GradArguments<T>&) { count(range); },
  };
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> table{counting<T, PlaneRange>(), counting<T, RowRange>()};
  return table;
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<Half>& kernels();
template const Kernels<BFloat16>& kernels();

int64_t last_level_cache_bytes(int) { return 32 << 20; }
void expect_writes(void*, int64_t) {}

}  // namespace bn_ext::cpu

namespace {

using namespace bn_ext;

void forward(const Shape& shape, DType dtype, bool training) {
  std::vector<float> vectors(4 * shape.c);
  float values = 0;  // stands for whole tensors, which the counting kernels do not look at
  ForwardParams p{};
  p.shape = shape;
  p.dtype = dtype;
  p.params_dtype = DType::kFloat32;
  p.training = training;
  p.eps = 1e-5;
  p.x = p.y = &values;
  p.mean = vectors.data();
  p.rstd = vectors.data() + shape.c;
  p.scale = vectors.data() + 2 * shape.c;
  p.offset = vectors.data() + 3 * shape.c;
  cpu::forward(p);
}

void backward(const Shape& shape, DType dtype) {
  std::vector<float> vectors(6 * shape.c);
  float values = 0;
  BackwardParams p{};
  p.shape = shape;
  p.dtype = dtype;
  p.params_dtype = DType::kFloat32;
  p.training = true;
  p.dy = p.x = p.dx = &values;
  p.mean = vectors.data();
  p.rstd = vectors.data() + shape.c;
  p.scale = vectors.data() + 2 * shape.c;
  p.offset = vectors.data() + 3 * shape.c;
  p.dweight = vectors.data() + 4 * shape.c;
  p.dbias = vectors.data() + 5 * shape.c;
  cpu::backward(p);
}

}  // namespace

int main() {
  Shape shape{};
  std::string dtype_name, pass;
  while (std::cin >> shape.n >> shape.c >> shape.s >> shape.channels_last >> dtype_name >> pass >> shares::threads) {
    const DType dtype = dtype_name == "float32" ? DType::kFloat32 : DType::kBFloat16;
    shares::total = shares::busiest = 0;
    if (pass == "backward") {
      backward(shape, dtype);
    } else {
      forward(shape, dtype, pass == "forward");
    }
    std::cout << shares::total << ' ' << shares::busiest << '\n';
  }
}
