// Weight modulation on a GPU. A block serves one filter, which it reads once and keeps in shared memory, in
// the order (channel, tap), until the norm is known. Filters that do not fit into shared memory are read
// again.
#pragma once

#include <initializer_list>

#include "../common/block.cuh"
#include "smc.h"

namespace litevae {
namespace smc {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // channels per block of Gather

namespace {

// Not inlined, because this function is long and rarely run.
template <class T>
LITEVAE_DEVICE_CALL T load_far(const char* at, DType dtype) {
  return load_one<T>(at, dtype);
}

// Scratch memory of the backward pass, in elements of the norm's type: for each filter its part of the
// gradient of each of its channels' scales, then for each filter its part of the gradient of the gain.
LITEVAE_CONSTEXPR int64_t gain_parts(int64_t filters, int64_t channels) { return filters * channels; }
inline int64_t scratch_bytes(const TensorView& weight, const TensorView& norm) {
  const int64_t filters = weight.size[0], channels = weight.size[1];
  return (gain_parts(filters, channels) + filters) * element_size(norm.dtype);
}

// One launch.
struct Pass {
  int64_t blocks;
  int threads;

  Strided weight, scale, gain, norm;
  Strided modulated;                                 // forward
  Strided grad, grad_weight, grad_scale, grad_gain;  // backward
  double eps;
  int64_t filters, group_filters;  // filters of all groups, and of one group
  int64_t channels, all_channels;  // channels of a filter, and of all groups
  int64_t taps;
  int64_t width;  // width of a filter, or 0 if the taps are evenly spaced in all tensors
  Divider by_channels, by_taps;
  int row;  // stride of channels in shared memory: odd, so that neighbouring channels lie in different banks
  bool staged;    // whether filters fit into shared memory
  void* scratch;  // scratch memory of the backward pass
};

LITEVAE_DEVICE int64_t place(const Pass& p, const Strided& t, int64_t i, int64_t k) {
  if (p.width == 0) return i * t.c + k * t.w;
  const Division tap = divide_far(k, p.width);
  return i * t.c + tap.quotient * t.h + tap.remainder * t.w;
}

// Finds channel i and tap k of a filter's element e, which counts in the order of memory.
LITEVAE_DEVICE void locate(const Pass& p, const Strided& t, int64_t e, int64_t& i, int64_t& k) {
  if (t.c < t.w)
    i = p.by_channels.take(e), k = e;
  else
    k = p.by_taps.take(e), i = e;
}

// A type that is known at run time only.
struct AnyType {};

// Calls body with a number of the stored type of a weight or a gradient. If T is double, the type is AnyType:
// float64 serves to check derivatives, so it may be slower, and there is less to compile.
template <class T, class Body>
LITEVAE_DEVICE void with_type(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == 8)
    body(AnyType());
  else if (dtype == DType::f32)
    body(float());
  else if (dtype == DType::f16)
    body(Half());
  else
    body(BFloat16());
}

template <class S, class T>
LITEVAE_DEVICE T load_stored(const char* at, DType dtype) {
  if constexpr (std::is_same<S, AnyType>::value) {
    return load_one<T>(at, dtype);
  } else {
    T value[1];
    load_vector<S>(at, value);
    return value[0];
  }
}

template <class S, class T>
LITEVAE_DEVICE void store_stored(char* at, DType dtype, T value) {
  const T run[1] = {value};
  if constexpr (std::is_same<S, AnyType>::value)
    store_one<T>(at, dtype, value);
  else
    store_vector<S>(at, run);
}

// Calls use(i, k, value) for a thread's elements of filter o, with several loads in flight.
template <class T, class Use>
LITEVAE_DEVICE void read(const Pass& p, const Block& block, const Strided& t, int64_t o, int thread,
                         const Use& use) {
  constexpr int kBatch = 8;
  const int64_t count = p.channels * p.taps;
  const char* const filter = t.data + o * t.n;
  with_type<T>(t.dtype, [&](auto stored) {
    for (int64_t e = thread; e < count; e += kBatch * block.threads) {
      T value[kBatch];
      int i[kBatch] = {}, k[kBatch] = {};
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (e + u * block.threads < count) {
          int64_t channel, tap;
          locate(p, t, e + u * block.threads, channel, tap);
          i[u] = static_cast<int>(channel), k[u] = static_cast<int>(tap);
          value[u] = load_stored<decltype(stored), T>(filter + place(p, t, channel, tap), t.dtype);
        }
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (e + u * block.threads < count) use(i[u], k[u], value[u]);
    }
  });
}

// Stores make(i, k) as the elements of filter o.
template <class T, class Make>
LITEVAE_DEVICE void write(const Pass& p, const Block& block, const Strided& t, int64_t o, int thread,
                          const Make& make) {
  const int64_t count = p.channels * p.taps;
  char* const filter = t.data + o * t.n;
  with_type<T>(t.dtype, [&](auto stored) {
#pragma unroll 2
    for (int64_t e = thread; e < count; e += block.threads) {
      int64_t i, k;
      locate(p, t, e, i, k);
      store_stored<decltype(stored)>(filter + place(p, t, i, k), t.dtype, make(i, k));
    }
  });
}

// A filter, its scales and, in the backward pass, its gradient, either in shared memory or in the tensors.
template <class T>
struct Filter {
  const Pass& p;
  int64_t o, first_channel;
  T *scales, *weights, *grads;

  LITEVAE_DEVICE Filter(const Pass& p, int64_t o, const Block& block) : p(p), o(o) {
    int64_t group = o;
    take(group, p.group_filters);
    first_channel = group * p.channels;
    scales = static_cast<T*>(block.dynamic_shared);
    weights = scales + p.channels, grads = weights + p.channels * p.row;
  }

  LITEVAE_DEVICE T load_scale(int64_t i) const {
    return load_far<T>(p.scale.data + (first_channel + i) * p.scale.c, p.scale.dtype);
  }
  LITEVAE_DEVICE T load(const Strided& t, int64_t i, int64_t k) const {
    return load_far<T>(t.data + o * t.n + place(p, t, i, k), t.dtype);
  }
  LITEVAE_DEVICE T scale(int64_t i) const { return p.staged ? scales[i] : load_scale(i); }
  LITEVAE_DEVICE T weight(int64_t i, int64_t k) const {
    return p.staged ? weights[i * p.row + k] : load(p.weight, i, k);
  }
  LITEVAE_DEVICE T grad(int64_t i, int64_t k) const {
    return p.staged ? grads[i * p.row + k] : load(p.grad, i, k);
  }
  LITEVAE_DEVICE T gain() const {
    return p.gain.data == nullptr ? T(1) : load_one<T>(p.gain.data, p.gain.dtype);
  }

  LITEVAE_DEVICE void stage_scales(const Block& block) const {
    if (!p.staged) return;
    block.each([&](int thread) {
      for (int64_t i = thread; i < p.channels; i += block.threads) scales[i] = load_scale(i);
    });
  }
};

template <class T>
struct Modulate {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = sizeof(T) == 8 ? 2 : 4;
  struct Shared {
    T values[1][kThreads], sums[kThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t o, const Block& block, Shared& shared) {
    const Filter<T> filter(p, o, block);
    filter.stage_scales(block);
    block.each([&](int thread) {
      T sum = 0;
      read<T>(p, block, p.weight, o, thread, [&](int64_t i, int64_t k, T weight) {
        const T scaled = filter.scale(i) * weight;
        if (p.staged) filter.weights[i * p.row + k] = scaled;
        sum += scaled * scaled;
      });
      shared.values[0][thread] = sum;
    });
    add_rows(block, Table{1, block.threads, 1, 1}, shared.values, shared.sums);
    block.each([&](int thread) {
      const T norm = sqrt(shared.sums[0]), factor = filter.gain() / (norm + static_cast<T>(p.eps));
      if (thread == 0) store_one<T>(p.norm.data + o * p.norm.c, p.norm.dtype, norm);
      write<T>(p, block, p.modulated, o, thread, [&](int64_t i, int64_t k) {
        return factor * (p.staged ? filter.weight(i, k) : filter.scale(i) * filter.weight(i, k));
      });
    });
  }
};

// With v = scale w and d = norm + eps, the gradient of v is gain (g / d - v (sum g v) / (norm d^2)).
template <class T>
struct ModulateBackward {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 2;
  struct Shared {
    T values[1][kThreads], sums[kThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t o, const Block& block, Shared& shared) {
    const Filter<T> filter(p, o, block);
    filter.stage_scales(block);
    if (p.staged)
      block.each([&](int thread) {
        read<T>(p, block, p.weight, o, thread,
                [&](int64_t i, int64_t k, T weight) { filter.weights[i * p.row + k] = weight; });
        read<T>(p, block, p.grad, o, thread,
                [&](int64_t i, int64_t k, T grad) { filter.grads[i * p.row + k] = grad; });
      });
    block.each([&](int thread) {
      T sum = 0;
      for (int64_t i = thread; i < p.channels; i += block.threads) {
        T products = 0;
        for (int64_t k = 0; k < p.taps; ++k) products += filter.weight(i, k) * filter.grad(i, k);
        sum += filter.scale(i) * products;
      }
      shared.values[0][thread] = sum;
    });
    add_rows(block, Table{1, block.threads, 1, 1}, shared.values, shared.sums);
    block.each([&](int thread) {
      const T norm = load_one<T>(p.norm.data + o * p.norm.c, p.norm.dtype), d = norm + static_cast<T>(p.eps);
      const T along = shared.sums[0] / d, gain = filter.gain();
      // One division after another, because the product of the three divisors may underflow.
      const T across = gain / d, back = norm > 0 ? gain * along / d / norm : T(0);
      const auto gradient = [&](int64_t i, int64_t k) {
        return across * filter.grad(i, k) - back * (filter.scale(i) * filter.weight(i, k));
      };
      write<T>(p, block, p.grad_weight, o, thread,
               [&](int64_t i, int64_t k) { return filter.scale(i) * gradient(i, k); });
      T* const parts = static_cast<T*>(p.scratch);
      for (int64_t i = thread; i < p.channels; i += block.threads) {
        T sum = 0;
        for (int64_t k = 0; k < p.taps; ++k) sum += filter.weight(i, k) * gradient(i, k);
        parts[o * p.channels + i] = sum;
      }
      if (thread == 0) parts[gain_parts(p.filters, p.channels) + o] = along;
    });
  }
};

// Adds up the filters' parts. A block serves kColumns channels; one more block serves the gain.
template <class T>
struct Gather {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 1;
  struct Shared {
    double values[1][kThreads], sums[kThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const bool of_gain = index * kColumns >= p.all_channels;
    const T* const parts = static_cast<const T*>(p.scratch);
    const Table table = Table::of(block, of_gain ? 1 : kColumns);
    block.each([&](int thread) {
      int64_t channel = index * kColumns + table.column(thread), first = 0, count = p.filters, step = 1;
      const T* from = parts + gain_parts(p.filters, p.channels);
      if (!of_gain) {
        int64_t group = channel < p.all_channels ? channel : 0;
        from = parts + take(group, p.channels);
        first = group * p.group_filters, count = p.group_filters, step = p.channels;
      }
      double sum = 0;
#pragma unroll 4
      for (int64_t o = table.row(thread); o < count; o += table.rows)
        sum += static_cast<double>(from[(first + o) * step]);
      shared.values[0][thread] = sum;
    });
    add_rows(block, table, shared.values, shared.sums);
    block.each([&](int thread) {
      const int64_t channel = index * kColumns + thread;
      const Strided &scale = p.grad_scale, &gain = p.grad_gain;
      if (of_gain && thread == 0)
        store_one(gain.data, gain.dtype, shared.sums[0]);
      else if (!of_gain && thread < kColumns && channel < p.all_channels)
        store_one(scale.data + channel * scale.c, scale.dtype, shared.sums[thread]);
    });
  }
};

// --- Launches: plain host code. `launch` runs a kernel.

// Returns how many bytes of shared memory a block needs for `copies` of a filter.
template <class T>
int prepare(Pass& p, const Inputs& in, std::initializer_list<Strided*> tensors, int copies) {
  p.scale = in_bytes(in.scale), p.gain = in_bytes(in.gain), p.norm = in_bytes(in.norm), p.eps = in.eps;
  p.filters = in.weight.size[0], p.group_filters = p.filters / in.groups();
  p.channels = in.weight.size[1], p.all_channels = in.scale.size[1];
  const int64_t height = in.weight.size[2], width = in.weight.size[3];
  p.taps = height * width;
  for (Strided* t : tensors) {
    if (!flatten(*t, height, width)) p.width = width;
    // The stride of a single tap is arbitrary. This one makes the channels innermost.
    if (p.taps == 1) t->w = t->c + 1;
  }
  p.by_channels = Divider::of(p.channels, p.channels * p.taps);
  p.by_taps = Divider::of(p.taps, p.channels * p.taps);
  p.blocks = p.filters, p.threads = kThreads;

  // Every GPU since sm_80 has this much, in addition to Body::Shared.
  constexpr int64_t kMaxSharedBytes = 92 * 1024;
  const int64_t bytes = p.channels * (1 + copies * (p.taps | 1)) * static_cast<int64_t>(sizeof(T));
  p.staged = bytes <= kMaxSharedBytes;
  p.row = static_cast<int>(p.taps | 1);
  return p.staged ? static_cast<int>(bytes) : 0;
}

template <class T, class Launch>
void run_in(const Forward& call, const Launch& launch) {
  Pass p{};
  p.weight = in_bytes(call.in.weight), p.modulated = in_bytes(call.modulated);
  const int shared = prepare<T>(p, call.in, {&p.weight, &p.modulated}, 1);
  launch(Modulate<T>(), p, shared);
}

template <class T, class Launch>
void run_in(const Backward& call, void* scratch, const Launch& launch) {
  Pass p{};
  p.weight = in_bytes(call.in.weight), p.grad = in_bytes(call.grad),
  p.grad_weight = in_bytes(call.grad_weight);
  p.grad_scale = in_bytes(call.grad_scale), p.grad_gain = in_bytes(call.grad_gain);
  p.scratch = scratch;
  const int shared = prepare<T>(p, call.in, {&p.weight, &p.grad, &p.grad_weight}, 2);
  launch(ModulateBackward<T>(), p, shared);
  p.blocks = (p.all_channels + kColumns - 1) / kColumns + (p.grad_gain.data != nullptr);
  launch(Gather<T>(), p, 0);
}

template <class Launch>
void run(const Forward& call, const Launch& launch) {
  call.in.norm.dtype == DType::f64 ? run_in<double>(call, launch) : run_in<float>(call, launch);
}

// `scratch` has scratch_bytes(weight, norm) bytes.
template <class Launch>
void run(const Backward& call, void* scratch, const Launch& launch) {
  call.in.norm.dtype == DType::f64 ? run_in<double>(call, scratch, launch)
                                   : run_in<float>(call, scratch, launch);
}

}  // namespace
}  // namespace smc
}  // namespace litevae
