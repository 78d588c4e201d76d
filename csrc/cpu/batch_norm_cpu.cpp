// The CPU back-end: sums, per-channel arithmetic, results; at::parallel_for around the kernels' plain loops.
#include "batch_norm_cpu.h"

#include <ATen/Parallel.h>

#include <cstring>
#include <memory>

#include "cache.h"
#include "channel.h"
#include "instruction_set.h"
#include "pages.h"
#include "partition.h"
#include "reduce.h"

namespace bn_ext::cpu {
namespace {

constexpr int64_t kSerialValues = 32768;   // a tensor this small is done before a second thread has started
constexpr int64_t kSerialChannels = 8192;  // likewise for per-channel arithmetic

double to_double(float value) { return value; }
double to_double(double value) { return value; }
double to_double(Half value) { return c10::Half(value.bits, c10::Half::from_bits()); }
double to_double(BFloat16 value) { return c10::BFloat16(value.bits, c10::BFloat16::from_bits()); }

template <typename T>
const KernelsOf<T, PlaneRange>& kernels_for(const PlanePartition&) {
  return kernels<T>().planes;
}
template <typename T>
const KernelsOf<T, RowRange>& kernels_for(const RowPartition&) {
  return kernels<T>().rows;
}

// `count` vectors of coefficients, uninitialised.
template <typename A>
class Coefficients {
 public:
  Coefficients(const Partition& partition, int64_t count)
      : length_(partition.columns * partition.coefficient_rows), values_(new A[static_cast<size_t>(length_ * count)]) {}
  A* operator[](int64_t i) { return values_.get() + i * length_; }

 private:
  int64_t length_;
  std::unique_ptr<A[]> values_;
};

// Whether what is read and what is written do not fit into the cache together.
template <typename T>
bool exceeds_cache(const Shape& shape) {
  return 2 * shape.numel() * int64_t(sizeof(T)) > last_level_cache_bytes();
}

// What a pass consists of, in this order. Without sums or without results, that stage is left out.
template <typename Sum, typename Finalise, typename Write>
struct Stages {
  bool has_sums;
  bool has_results;
  Sum sum;            // (group, segment)
  Finalise finalise;  // (first channel, last channel + 1)
  Write write;        // (group, segment, whether the next group's sums come after it)
};
template <typename Sum, typename Finalise, typename Write>
Stages(bool, bool, Sum, Finalise, Write) -> Stages<Sum, Finalise, Write>;

// Group by group, each while it is in cache, where there are groups enough for the threads; otherwise stage by stage.
// Results go backwards: what was read last is still in cache. Few parallel regions: on a busy machine each one costs.
template <typename P, typename S>
void run_stages(const P& p, int64_t numel, const S& stages) {
  const bool serial = numel <= kSerialValues || at::get_num_threads() == 1;
  if (stages.has_sums && p.cached && (serial || p.groups >= 4 * at::get_num_threads())) {
    at::parallel_for(0, p.groups, serial ? p.groups : 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t segment = 0; segment < p.segments; ++segment) stages.sum(group, segment);
        stages.finalise(p.column_begin(group) / p.run, std::min(p.channels, p.column_end(group) / p.run));
        if (!stages.has_results) continue;
        for (int64_t segment = p.segments - 1; segment >= 0; --segment) stages.write(group, segment, true);
      }
    });
    return;
  }
  const int64_t units = p.groups * p.segments;
  const int64_t grain = serial ? units : 1;
  if (stages.has_sums) {
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) stages.sum(unit % p.groups, unit / p.groups);
    });
  }
  at::parallel_for(0, p.channels, serial || p.joined ? p.channels : kSerialChannels, stages.finalise);
  if (!stages.has_results) return;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = stages.has_sums ? begin + end - 1 - i : i;
      stages.write(unit % p.groups, unit / p.groups, false);
    }
  });
}

bool needs_sums(const ForwardParams& p) { return p.training && !p.repeats; }

template <typename T, typename P>
void forward(const ForwardParams& p, const P& partition) {
  using A = acc_t<T>;
  const auto& kernels = kernels_for<T>(partition);
  const T* x = static_cast<const T*>(p.x);
  const bool has_sums = needs_sums(p);
  Partials<Moments> partials(partition, has_sums);
  Coefficients<A> vectors(partition, 3);
  const ApplyArguments<T> arguments{x,
                                    static_cast<const T*>(p.z),
                                    static_cast<T*>(p.y),
                                    p.mask,
                                    p.activation,
                                    {vectors[0], vectors[1], vectors[2]},
                                    exceeds_cache<T>(p.shape)};
  // Nothing was written so far, and nothing fails from here on.
  if (p.mask != nullptr) std::memset(p.mask, 0, static_cast<size_t>(mask_bytes(p.shape.numel())));
  if (has_sums && p.num_batches_tracked != nullptr) ++*p.num_batches_tracked;
  const double momentum = p.cumulative && p.num_batches_tracked ? 1.0 / double(*p.num_batches_tracked) : p.momentum;

  const auto sum = [&](int64_t group, int64_t segment) {
    kernels.moments(partition.range(group, segment, false), x, partials.at(segment) + partition.column_begin(group));
  };
  const auto batch_moments = [&](int64_t c, double column_count) {
    const Moments total = merge_columns(partition, c, column_count, partials.at(0));
    if (std::isfinite(total.m2)) return total;
    return moments_in_double(p.shape, x, c, [](T value) { return to_double(value); });
  };
  const auto finalise = [&](int64_t c_begin, int64_t c_end) {
    const double count =
        has_sums ? merge_segments(partition, columns_begin(partition, c_begin), columns_end(partition, c_end), partials)
                 : 0;
    for (int64_t c = c_begin; c < c_end; ++c) {
      const ChannelAffine<A> affine = has_sums    ? affine_of_batch<A>(p, c, batch_moments(c, count), momentum)
                                      : p.repeats ? affine_of_saved<A>(p, c)
                                                  : affine_of_running<A>(p, c);
      if (!p.repeats) {
        static_cast<A*>(p.mean)[c] = affine.mean;
        static_cast<A*>(p.rstd)[c] = affine.rstd;
        static_cast<A*>(p.scale)[c] = affine.scale;
        static_cast<A*>(p.offset)[c] = affine.offset;
      }
      for_each_coefficient(partition, c, [&](int64_t i) {
        vectors[0][i] = affine.mean;
        vectors[1][i] = affine.scale;
        vectors[2][i] = affine.offset;
      });
    }
  };
  const auto write = [&](int64_t group, int64_t segment, bool by_group) {
    kernels.apply(partition.range(group, segment, by_group), arguments);
  };
  run_stages(partition, p.shape.numel(), Stages{has_sums, true, sum, finalise, write});
}

template <typename T, typename P>
void backward(const BackwardParams& p, const P& partition) {
  using A = acc_t<T>;
  const auto& kernels = kernels_for<T>(partition);
  const std::vector<T> repeated(p.dy_is_scalar ? kMaxRun : 0, *static_cast<const T*>(p.dy));
  const bool has_sums = p.needs_sums();
  Partials<GradSums> partials(partition, has_sums);
  Coefficients<A> vectors(partition, 5);
  const GradArguments<T> arguments{p.dy_is_scalar ? repeated.data() : static_cast<const T*>(p.dy),
                                   p.dy_is_scalar,
                                   static_cast<const T*>(p.x),
                                   static_cast<const T*>(p.z),
                                   p.mask,
                                   p.activation,
                                   {vectors[0], vectors[1], vectors[2]},
                                   p.training,
                                   vectors[3],
                                   vectors[4],
                                   static_cast<T*>(p.dx),
                                   static_cast<T*>(p.dz),
                                   exceeds_cache<T>(p.shape)};
  for (int64_t c = 0; c < partition.channels; ++c) {
    for_each_coefficient(partition, c, [&](int64_t i) {
      vectors[0][i] = static_cast<const A*>(p.mean)[c];
      vectors[1][i] = static_cast<const A*>(p.scale)[c];
      vectors[2][i] = static_cast<const A*>(p.offset)[c];
    });
  }

  const auto sum = [&](int64_t group, int64_t segment) {
    GradSums* out = partials.at(segment) + partition.column_begin(group);
    kernels.grad_sums(partition.range(group, segment, false), arguments, out);
  };
  const auto finalise = [&](int64_t c_begin, int64_t c_end) {
    if (!has_sums) return;
    merge_segments(partition, columns_begin(partition, c_begin), columns_end(partition, c_end), partials);
    for (int64_t c = c_begin; c < c_end; ++c) {
      const double rstd = static_cast<const A*>(p.rstd)[c];
      double sum_dy = 0;
      double sum_dy_xhat = 0;
      for_each_column(partition, c, [&](int64_t column) {
        sum_dy += partials.at(0)[column].dy;
        sum_dy_xhat += partials.at(0)[column].dy_centred * rstd;
      });
      write_param(p.dweight, p.params_dtype, c, sum_dy_xhat);
      write_param(p.dbias, p.params_dtype, c, sum_dy);
      const double scale = static_cast<const A*>(p.scale)[c];
      const double count = double(p.shape.values_per_channel());
      for_each_coefficient(partition, c, [&](int64_t i) {
        vectors[3][i] = static_cast<A>(-scale * rstd * sum_dy_xhat / count);
        vectors[4][i] = static_cast<A>(-scale * sum_dy / count);
      });
    }
  };
  const auto write = [&](int64_t group, int64_t segment, bool by_group) {
    kernels.grad_input(partition.range(group, segment, by_group), arguments);
  };
  const bool has_results = p.dx != nullptr || p.dz != nullptr;
  run_stages(partition, p.shape.numel(), Stages{has_sums, has_results, sum, finalise, write});
}

// Calls body(T{}, partition) for the tensor's type and layout.
template <typename Body>
void dispatch(DType dtype, const Shape& shape, bool has_sums, const Body& body) {
  const auto with_type = [&](auto value) {
    if (walks_rows(shape, has_sums)) {
      body(value, RowPartition(shape, sizeof(value), has_sums));
    } else {
      body(value, PlanePartition(shape, sizeof(value), has_sums));
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_type(float{});
    case DType::kFloat64:
      return with_type(double{});
    case DType::kFloat16:
      return with_type(Half{});
    case DType::kBFloat16:
      return with_type(BFloat16{});
  }
}

}  // namespace

void forward(const ForwardParams& p) {
  dispatch(p.dtype, p.shape, needs_sums(p), [&](auto value, const auto& partition) {
    expect_writes(p.y, p.shape.numel() * int64_t(sizeof(value)));
    forward<decltype(value)>(p, partition);
  });
}

void backward(const BackwardParams& p) {
  dispatch(p.dtype, p.shape, p.needs_sums(), [&](auto value, const auto& partition) {
    for (void* result : {p.dx, p.dz}) expect_writes(result, p.shape.numel() * int64_t(sizeof(value)));
    backward<decltype(value)>(p, partition);
  });
}

}  // namespace bn_ext::cpu
