// The CPU back-end: computes sums, per-channel arithmetic and results with at::parallel_for around the kernels.
#include "batch_norm_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
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

constexpr int64_t kSerialValues = 16384;   // a tensor this small is done before a second thread starts
constexpr int64_t kSerialChannels = 8192;  // likewise, for per-channel arithmetic

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

// Whether the kernels can read a vector with one value per channel directly.
bool is_by_channel(const Partition& p) { return p.columns * p.coefficient_rows == p.channels; }

// `count` uninitialised vectors of coefficients, indexed as the kernels index them.
template <typename A>
class Coefficients {
 public:
  Coefficients(const Partition& partition, int64_t count)
      : partition_(partition),
        length_(partition.columns * partition.coefficient_rows),
        values_(new A[static_cast<size_t>(length_ * count)]) {}

  A* operator[](int64_t vector) { return values_.get() + vector * length_; }

  // Sets the coefficients of n channels.
  void set(int64_t vector, int64_t begin, int64_t n, const A* of_channels) {
    A* values = (*this)[vector];
    if (is_by_channel(partition_)) {
      std::copy_n(of_channels, n, values + begin);
      return;
    }
    const int64_t stride = partition_.channels * partition_.run;
    for (int64_t block = begin * partition_.run; block < length_; block += stride) {
      for (int64_t i = 0; i < n; ++i) std::fill_n(values + block + i * partition_.run, partition_.run, of_channels[i]);
    }
  }

 private:
  const Partition& partition_;
  int64_t length_;
  std::unique_ptr<A[]> values_;
};

// Calls body(begin, n) for blocks of the channels [begin, end).
template <typename Body>
void for_each_block(int64_t begin, int64_t end, const Body& body) {
  for (; begin < end; begin += kChannelBlock) body(begin, std::min(kChannelBlock, end - begin));
}

// Whether an input and a result do not fit into the cache together.
template <typename T>
bool exceeds_cache(const Shape& shape) {
  return 2 * shape.numel() * int64_t(sizeof(T)) > last_level_cache_bytes(at::get_num_threads());
}

// The stages of a pass, in this order. A pass may have no sums or no results.
template <typename Sum, typename Finalise, typename Write>
struct Stages {
  bool has_sums;
  bool has_results;
  Sum sum;            // (group, segment)
  Finalise finalise;  // (first channel, last channel + 1)
  Write write;        // (group, segment, whether the next group's sums follow)
};
template <typename Sum, typename Finalise, typename Write>
Stages(bool, bool, Sum, Finalise, Write) -> Stages<Sum, Finalise, Write>;

// Runs group by group, while each is in cache, if there are enough groups for the threads; otherwise stage by stage.
// Results are in reverse order: values read last are still in cache. Each parallel region costs time on a busy machine.
template <typename P, typename S>
void run_stages(const P& p, int64_t numel, const S& stages) {
  const bool serial = numel <= kSerialValues || at::get_num_threads() == 1;
  const bool by_group = stages.has_sums && p.cached && (serial || p.groups >= 4 * at::get_num_threads());
  if (by_group || p.segments == 1) {
    at::parallel_for(0, p.groups, serial ? p.groups : 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        if (stages.has_sums) {
          for (int64_t segment = 0; segment < p.segments; ++segment) stages.sum(group, segment);
        }
        stages.finalise(p.column_begin(group) / p.run, std::min(p.channels, p.column_end(group) / p.run));
        if (!stages.has_results) continue;
        for (int64_t segment = p.segments - 1; segment >= 0; --segment) stages.write(group, segment, stages.has_sums);
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

bool needs_sums(const ForwardParams& p) { return p.training && !p.recompute; }

template <typename T, typename P>
void forward(const ForwardParams& p, const P& partition) {
  using A = acc_t<T>;
  const auto& kernels = kernels_for<T>(partition);
  const T* x = static_cast<const T*>(p.x);
  const bool has_sums = needs_sums(p);
  Partials<Moments> partials(partition, has_sums);
  const SavedVectors<A> saved(p, 0);
  const bool by_channel = is_by_channel(partition);
  Coefficients<A> vectors(partition, by_channel ? 0 : 3);
  const Affine<A> affine =
      by_channel ? Affine<A>{saved.mean, saved.scale, saved.offset} : Affine<A>{vectors[0], vectors[1], vectors[2]};
  const ApplyArguments<T> arguments{
      x, static_cast<const T*>(p.z), static_cast<T*>(p.y), p.mask, p.activation, affine, exceeds_cache<T>(p.shape)};
  // Nothing has been written so far, and nothing can fail from here on.
  if (p.mask != nullptr) std::memset(p.mask, 0, static_cast<size_t>(mask_bytes(p.shape.numel())));
  if (has_sums && p.num_batches_tracked != nullptr) ++*p.num_batches_tracked;
  const double momentum = p.cumulative && p.num_batches_tracked ? 1.0 / double(*p.num_batches_tracked) : p.momentum;

  const auto sum = [&](int64_t group, int64_t segment) {
    Moments* out = partials.at(segment) + partition.column_begin(group) / partition.run;
    kernels.moments(partition.range(group, segment, false), x, out);
  };
  const auto finalise = [&](int64_t c_begin, int64_t c_end) {
    const double count = has_sums ? merge_segments(partition, c_begin, runs_end(partition, c_end), partials) : 0;
    Moments* moments = partials.at(0);
    for (int64_t c = c_begin; has_sums && c < c_end; ++c) {
      if (partition.joined) merge_runs(partition, c, count, moments);
      if (std::isfinite(moments[c].m2)) continue;
      moments[c] = moments_in_double(p.shape, x, c, [](T value) { return to_double(value); });
    }
    for_each_block(c_begin, c_end, [&](int64_t begin, int64_t n) {
      if (has_sums) {
        save_batch<A>(p, momentum, begin, n, moments + begin);
      } else if (!p.recompute) {
        save_running<A>(p, begin, n);
      }
      if (by_channel) return;
      vectors.set(0, begin, n, saved.mean + begin);
      vectors.set(1, begin, n, saved.scale + begin);
      vectors.set(2, begin, n, saved.offset + begin);
    });
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
  const T* x = static_cast<const T*>(p.x);
  const bool has_sums = p.needs_sums();
  Partials<GradSums> partials(partition, has_sums);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* offset = static_cast<const A*>(p.offset);
  const bool by_channel = is_by_channel(partition);
  Coefficients<A> vectors(partition, by_channel ? 2 : 5);
  const Affine<A> affine = by_channel ? Affine<A>{mean, scale, offset} : Affine<A>{vectors[2], vectors[3], vectors[4]};
  const GradArguments<T> arguments{p.dy_is_scalar ? repeated.data() : static_cast<const T*>(p.dy),
                                   p.dy_is_scalar,
                                   x,
                                   static_cast<const T*>(p.z),
                                   p.mask,
                                   p.activation,
                                   affine,
                                   p.training,
                                   vectors[0],
                                   vectors[1],
                                   static_cast<T*>(p.dx),
                                   static_cast<T*>(p.dz),
                                   exceeds_cache<T>(p.shape)};
  if (!by_channel) {
    vectors.set(2, 0, partition.channels, mean);
    vectors.set(3, 0, partition.channels, scale);
    vectors.set(4, 0, partition.channels, offset);
  }

  const auto sum = [&](int64_t group, int64_t segment) {
    GradSums* out = partials.at(segment) + partition.column_begin(group) / partition.run;
    kernels.grad_sums(partition.range(group, segment, false), arguments, out);
  };
  const auto finalise = [&](int64_t c_begin, int64_t c_end) {
    if (!has_sums) return;
    merge_segments(partition, c_begin, runs_end(partition, c_end), partials);
    GradSums* sums = partials.at(0);
    for (int64_t c = c_begin; partition.joined && c < c_end; ++c) merge_runs(partition, c, sums);
    for_each_block(c_begin, c_end, [&](int64_t begin, int64_t n) {
      A slope[kChannelBlock], shift[kChannelBlock];
      save_gradients<A>(p, begin, n, sums + begin, slope, shift);
      if (!p.training) return;
      vectors.set(0, begin, n, slope);
      vectors.set(1, begin, n, shift);
    });
  };
  const auto write = [&](int64_t group, int64_t segment, bool by_group) {
    kernels.grad_input(partition.range(group, segment, by_group), arguments);
  };
  const bool has_results = p.dx != nullptr || p.dz != nullptr;
  run_stages(partition, p.shape.numel(), Stages{has_sums, has_results, sum, finalise, write});
}

// Calls body(T{}, partition) for the tensor's type and memory format. The kernels prefetch the values of a tensor that
// is larger than `cached_bytes`.
template <typename Body>
void dispatch(DType dtype, const Shape& shape, bool has_sums, int64_t cached_bytes, const Body& body) {
  const auto with_type = [&](auto value) {
    const bool fetches = shape.numel() * int64_t(sizeof(value)) > cached_bytes;
    if (walks_rows(shape, has_sums)) {
      body(value, RowPartition(shape, sizeof(value), has_sums, fetches));
    } else {
      body(value, PlanePartition(shape, sizeof(value), has_sums, fetches));
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
  // In eval, an x that fits was probably computed just before, and is read in memory order: prefetching it would be
  // wasted work. In training the order has jumps, and other tensors of the step have displaced a part of the cache.
  const int64_t cached_bytes = last_level_cache_bytes(at::get_num_threads()) / (needs_sums(p) ? 6 : 2);
  dispatch(p.dtype, p.shape, needs_sums(p), cached_bytes, [&](auto value, const auto& partition) {
    expect_writes(p.y, p.shape.numel() * int64_t(sizeof(value)));
    forward<decltype(value)>(p, partition);
  });
}

void backward(const BackwardParams& p) {
  // x was computed long ago, so most of it is no longer in cache.
  const int64_t cached_bytes = last_level_cache_bytes(at::get_num_threads()) / 6;
  dispatch(p.dtype, p.shape, p.needs_sums(), cached_bytes, [&](auto value, const auto& partition) {
    for (void* result : {p.dx, p.dz}) expect_writes(result, p.shape.numel() * int64_t(sizeof(value)));
    backward<decltype(value)>(p, partition);
  });
}

}  // namespace bn_ext::cpu
