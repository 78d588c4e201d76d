// Random inputs.
#include <cmath>
#include <random>

#include "reference.h"

namespace kernels_driver {
namespace {

constexpr double kHuge = 1e19;  // float32 ends at 3.4e38

class Generator {
 public:
  explicit Generator(unsigned seed) : engine_(seed) {}

  Values normal(DType dtype, int64_t count, double mean = 0, double deviation = 1) {
    Values values(count);
    for (double& value : values) value = mean + deviation * normal_(engine_);
    return from_memory(dtype, to_memory(dtype, values));
  }

  Values positive(DType dtype, int64_t count) {
    Values values = normal(dtype, count);
    for (double& value : values) value = std::fabs(value) + 0.5;
    return from_memory(dtype, to_memory(dtype, values));
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

}  // namespace

Inputs make_inputs(const Case& c) {
  Generator random(c.seed);
  const double scale = c.huge ? kHuge : 1;
  Inputs inputs;
  inputs.x = random.normal(c.dtype, c.shape.numel(), 0.5 * scale, 2 * scale);
  if (c.has_residual) inputs.z = random.normal(c.dtype, c.shape.numel());
  inputs.dy = random.normal(c.dtype, c.dy_is_scalar ? 1 : c.shape.numel());
  inputs.weight = random.normal(c.params_dtype, c.shape.c);
  inputs.bias = random.normal(c.params_dtype, c.shape.c);
  inputs.running_mean = random.normal(c.params_dtype, c.shape.c);
  inputs.running_var = random.positive(c.params_dtype, c.shape.c);
  return inputs;
}

}  // namespace kernels_driver
