// The list of cases: every type, width of access, layout and variant by the multi-kernel path and by teams, then what
// is seldom asked for.
#include "cases.h"

#include <algorithm>
#include <numeric>

namespace kernels_driver {
namespace {

using bn_ext::Shape;
using bn_ext::cuda::Request;
using bn_ext::cuda::Variant;

enum class Layout { kWidePlanes, kNarrowPlanes, kChannelsLast, kFeatures };

// What decides which instance of a kernel it is.
struct Instance {
  DType dtype;
  int access;  // bytes that a thread reads at once
  Layout layout;

  int value_bytes() const { return static_cast<int>(bytes_of(dtype)); }
  int vector() const { return access / value_bytes(); }
};

// Even: memory and slices are made of whole bytes of a mask, and what makes accesses narrow is where tensors begin.
// Odd: rows of C * S values which are an odd multiple of what is read at once.
Shape shape_of(const Instance& instance, bool even, bool small) {
  const int vector = instance.vector();
  const int line = 512 / instance.value_bytes();  // values of the least plane that is a slice of its own
  switch (instance.layout) {
    case Layout::kWidePlanes:
      return {1, 3, even ? line + 8 : vector * (line / vector | 1), false};
    case Layout::kNarrowPlanes:
      return even ? Shape{1, small ? 8 : 16, small ? 8 : 9, false} : Shape{1, vector * 3, 9, false};
    default:
      // Three slices of 128 bytes, of which the last is smaller, or one, where they begin at sectors of 32 bytes.
      const int vectors = small ? 8 : 22;
      const int channels = even ? std::max(8, vector * vectors / 8 * 8) : vector * (vectors / 2 * 2 - 3);
      return {1, channels, instance.layout == Layout::kFeatures ? 1 : 6, instance.layout == Layout::kChannelsLast};
  }
}

// With so many images that a thread has about as many rows as the path needs, and some threads one less.
Shape with_images(Shape shape, const Instance& instance, Path path, const Machine& device) {
  shape.n = 4096;
  const Plan plan = bn_ext::cuda::make_plan({shape, instance.value_bytes(), instance.access, false, 0}, {1});
  const int64_t rows = rows_per_thread(path, plan.columns == 1, device) * plan.row_lanes - plan.row_lanes / 3;
  const int64_t rows_of_image = std::max<int64_t>(1, plan.rows / shape.n);
  shape.n = std::max<int64_t>(1, rows / rows_of_image);
  return shape;
}

class List {
 public:
  explicit List(const Machine& device) : device_(device) {}

  Case& add(Path path, const Instance& instance, bool even, const NamedActivation& activation = identity()) {
    const bool small = path == Path::kClusterSpilling || path == Path::kGridSpilling || path == Path::kWholeGrid;
    Case c{};
    c.path = path;
    c.dtype = instance.dtype;
    c.params_dtype = accumulate_dtype(instance.dtype);
    c.shape = with_images(shape_of(instance, even, small), instance, path, device_);
    c.misalignment = even && instance.access < 16 ? instance.access : 0;
    c.activation = activation;
    c.training = true;
    c.has_params = true;
    c.wanted = Wanted();
    c.seed = static_cast<unsigned>(cases_.size());
    if (has(device_, path)) {
      cases_.push_back(c);
      return cases_.back();
    }
    return left_out_ = c;
  }

  std::vector<Case> take() { return std::move(cases_); }

 private:
  const Machine& device_;
  std::vector<Case> cases_;
  Case left_out_ = {};
};

constexpr Path kTeams[] = {Path::kBlock, Path::kCluster, Path::kGrid, Path::kClusterSpilling, Path::kGridSpilling};

// Every instance of every kernel, by the multi-kernel path in training and eval mode, and by teams.
class Instances {
 public:
  explicit Instances(List& list) : list_(list) {}

  void add_all() {
    for (const DType dtype : kDTypes) {
      for (int access = 16; access >= static_cast<int>(bytes_of(dtype)); access /= 2) {
        for (const Layout layout : {Layout::kWidePlanes, Layout::kNarrowPlanes, Layout::kChannelsLast}) {
          for (const Variant variant : {Variant::kPlain, Variant::kRelu, Variant::kReluLike, Variant::kAny}) {
            add({dtype, access, layout}, variant);
          }
        }
      }
    }
  }

 private:
  void add(Instance instance, Variant variant) {
    if (variant == Variant::kAny && instance.vector() > bn_ext::cuda::most_values_of_any(instance.value_bytes()))
      return;
    if (variant == Variant::kRelu && instance.access != bn_ext::cuda::kWidestAccess) return;
    if (instance.layout == Layout::kChannelsLast && count_ % 2 == 0) instance.layout = Layout::kFeatures;
    if (variant != Variant::kRelu) ++count_;  // so that the other variants take turns
    add(Path::kMultiKernel, instance, variant, true, false);
    if (variant <= Variant::kRelu || count_ % 2 == 0) add(Path::kMultiKernel, instance, variant, false, false);
    if (variant == Variant::kReluLike) add(Path::kMultiKernel, instance, variant, true, true);
    const Path team = kTeams[count_ % std::size(kTeams)];
    add(team, instance, variant, true, false);
    if (variant == Variant::kReluLike) add(team, instance, variant, true, true);
  }

  // With a residual, the last kernel of the multi-kernel path finds g in dz, and is another one.
  void add(Path path, const Instance& instance, Variant variant, bool training, bool has_residual) {
    const unsigned turn = turns_[static_cast<int>(variant)]++;
    const bool even = turn / 2 % 2 == 0;
    Case& c = list_.add(path, instance, even, activation_of(variant, turn, has_residual));
    c.training = training;
    c.has_residual = has_residual;
    c.has_mask = has_residual && variant == Variant::kReluLike;
    if (bytes_of(c.dtype) == 2 && count_ % 3 == 0) c.params_dtype = c.dtype;
  }

  static const NamedActivation& activation_of(Variant variant, unsigned turn, bool has_residual) {
    if (variant == Variant::kPlain) return identity();
    if (variant == Variant::kRelu) return relu_likes()[0];
    if (variant == Variant::kReluLike) return relu_likes()[has_residual ? turn % 3 : 1 + turn % 2];
    return others()[turn % others().size()];
  }

  List& list_;
  unsigned count_ = 0;
  unsigned turns_[4] = {};
};

void add_gradients_wanted(List& list, const Instance& instance) {
  const NamedActivation &silu = others()[1], &relu = relu_likes()[0];
  for (const bool training : {true, false}) {
    const auto add = [&](const NamedActivation& activation, const Wanted& wanted) -> Case& {
      Case& c = list.add(Path::kMultiKernel, instance, false, activation);
      c.training = training;
      c.wanted = wanted;
      return c;
    };
    constexpr Wanted kSome[] = {{true, true, false, false},
                                {false, true, true, false},
                                {false, true, false, true},
                                {false, true, false, false}};
    for (const Wanted& wanted : kSome) {
      if (wanted.dx || wanted.dweight || wanted.dbias) add(identity(), wanted);
      add(silu, wanted).has_residual = true;
      Case& c = add(relu, wanted);
      c.has_residual = c.has_mask = true;
    }
    for (const NamedActivation& activation : {identity(), silu}) {
      add(activation, {}).dy_is_scalar = true;
      add(activation, {true, true, false, false}).dy_is_scalar = true;
    }
    Case& all = add(relu, {});
    all.dy_is_scalar = all.has_residual = all.has_mask = true;
  }
  Case& c = list.add(Path::kBlock, instance, false, relu);
  c.has_residual = c.has_mask = true;
  c.wanted = {false, true, true, true};
}

// What has a residual without a mask: one alone, one before relu or before another activation, whose backward pass no
// team does.
void add_residuals(List& list, const Instance& instance, bool even) {
  for (const Path path : {Path::kMultiKernel, Path::kBlock, Path::kCluster, Path::kGrid}) {
    for (const NamedActivation& activation : {identity(), relu_likes()[0], others()[1]}) {
      list.add(path, instance, even, activation).has_residual = true;
    }
  }
}

void add_statistics(List& list, const Instance& instance) {
  list.add(Path::kMultiKernel, instance, false).cumulative = true;
  list.add(Path::kMultiKernel, instance, false).has_params = false;
  list.add(Path::kBlock, instance, true).has_params = false;
}

// Not float16, nor float64, whose squares are within what kernels compute in.
void add_beyond_float32(List& list, DType dtype) {
  for (const Path path : {Path::kMultiKernel, Path::kBlock, Path::kCluster, Path::kGrid}) {
    for (const Layout layout : {Layout::kWidePlanes, Layout::kChannelsLast}) {
      Case& c = list.add(path, {dtype, 16, layout}, layout == Layout::kWidePlanes);
      c.huge = true;
      c.skip_nonfinite = layout == Layout::kChannelsLast;
      c.wanted.dx = false;  // its coefficients would be subnormal
    }
  }
}

// Spread, so that those before any end are of every kind.
std::vector<Case> spread(const std::vector<Case>& cases) {
  size_t step = cases.size() * 3 / 8;
  while (std::gcd(step, cases.size()) != 1) ++step;
  std::vector<Case> result;
  for (size_t i = 0; i < cases.size(); ++i) result.push_back(cases[i * step % cases.size()]);
  return result;
}

}  // namespace

std::string Case::name() const {
  std::string words = name_of(dtype);
  const auto add = [&](const std::string& more) { words += ", " + more; };
  if (params_dtype != accumulate_dtype(dtype)) words += " and params";
  words += " (" + std::to_string(shape.n) + " " + std::to_string(shape.c) + " " + std::to_string(shape.s) + ")";
  if (shape.channels_last) words += " channels_last";
  if (misalignment > 0) words += " + " + std::to_string(misalignment);
  add(name_of(path));
  add(activation.name);
  if (has_residual) words += has_mask ? " with residual and mask" : " with residual";
  add(training ? "training" : "eval");
  if (!has_params) add("no params");
  if (cumulative) add("cumulative");
  if (skip_nonfinite) add("skip_nonfinite");
  if (huge) add("huge");
  if (dy_is_scalar) add("one dy");
  if (!wanted.dx) add("no dx");
  if (!wanted.dweight) add("no dweight");
  if (!wanted.dbias) add("no dbias");
  return words;
}

std::vector<Case> all_cases(const Machine& device) {
  List list(device);
  Instances(list).add_all();
  for (const DType dtype : kDTypes) {
    list.add(Path::kWholeGrid, {dtype, static_cast<int>(bytes_of(dtype)), Layout::kWidePlanes}, false);
    list.add(Path::kAny, {dtype, 16, Layout::kWidePlanes}, true);
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    add_gradients_wanted(list, {dtype, 8, Layout::kWidePlanes});
    add_residuals(list, {dtype, 8, Layout::kWidePlanes}, true);
    add_residuals(list, {dtype, 8, Layout::kChannelsLast}, false);
    add_statistics(list, {dtype, 8, Layout::kNarrowPlanes});
    add_beyond_float32(list, dtype);
  }
  return spread(list.take());
}

}  // namespace kernels_driver
