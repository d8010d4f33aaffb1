// Weight modulation on the CPU. Forward and backward make one pass over the weight each. They process one
// filter at a time, which stays in the first-level cache between the computation of its norm and its use.
//
// A filter is processed in the weight's own order, as runs of adjacent values that share one row of scales.
// If the channels are innermost, there is a run per tap. If the taps are innermost, the filter is one run,
// and the scales are repeated for the taps of a channel. Filters in another order are transposed in vectors.
//
// This file is compiled once per instruction set, so everything below has internal linkage and uses no
// library templates.
#include <math.h>

#include <new>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "smc.h"

namespace litevae {
namespace LITEVAE_ISA {
using smc::Backward;
using smc::Forward;
using smc::Inputs;

namespace {

// Filters of a part, whose contributions to the scales' gradients are added up together.
constexpr int64_t kFiltersPerPart = 16;
// Below this number of elements, starting threads costs more time than it saves.
constexpr int64_t kElementsForThreads = 1 << 15;
// Only filters of 3 x 3 taps are transposed in vectors.
constexpr int kTaps = 9;
// Elements that are added up in the type of the arithmetic. Their sums are added up in double.
constexpr int64_t kElementsPerSum = 1024;

template <class T>
void load_vector(const TensorView& t, T* to) {
  load_row(t.dtype, static_cast<const char*>(t.data), t.stride[1], t.size[1], 1, to);
}

template <class T>
void store_vector(const T* from, const TensorView& t) {
  store_row(t.dtype, from, static_cast<char*>(t.data), t.stride[1], t.size[1], 1);
}

// Distances between a filter's channels, and between the rows and columns of its taps.
struct Order {
  int64_t channel, row, column;
  bool operator==(const Order& o) const { return channel == o.channel && row == o.row && column == o.column; }
};

struct Sizes {
  int64_t filters, inputs, width, taps, values, groups;
  double gain;
  Order by_channel;  // taps innermost
  Order order;       // order of the arithmetic: by_channel if the weight has it, else channels innermost
  int64_t length;    // length of a run
  int64_t copies;    // copies of each scale in a run

  explicit Sizes(const Inputs& in)
      : filters(in.weight.size[0]),
        inputs(in.weight.size[1]),
        width(in.weight.size[3]),
        taps(in.weight.size[2] * width),
        values(inputs * taps),
        groups(in.groups()),
        gain(1),
        by_channel{taps, width, 1},
        order(order_of(in.weight)),
        length(values),
        copies(taps) {
    if (in.gain.data != nullptr) load_vector(in.gain, &gain);
    if (order == by_channel) return;
    order = ordered(in.weight, 1, width * inputs, inputs);
    length = inputs, copies = 1;
  }
  // The stride of a dimension of one element is arbitrary. It becomes that of `by_channel`.
  Order ordered(const TensorView& t, int64_t channel, int64_t row, int64_t column) const {
    return {t.size[1] == 1 ? taps : channel, t.size[2] == 1 ? width : row, t.size[3] == 1 ? 1 : column};
  }
  Order order_of(const TensorView& t) const { return ordered(t, t.stride[1], t.stride[2], t.stride[3]); }
  int64_t group(int64_t filter) const { return filter / (filters / groups); }
};

// Prefetches the next filter, if it is dense, while the current one is being written.
struct Ahead {
  const char* data;
  int64_t bytes;
  Ahead(const TensorView& t, int64_t filter)
      : data(static_cast<const char*>(t.data) + filter * t.stride[0] * element_size(t.dtype)),
        bytes(element_size(t.dtype)) {}
  void fetch(int64_t value) const { __builtin_prefetch(data + value * bytes); }
};

// Calls f with a pointer of the tensor's type to one of its filters. Only arithmetic in double sees doubles.
template <class T, class F>
void with_filter(const TensorView& t, int64_t filter, const F& f) {
  const int64_t offset = filter * t.stride[0];
  switch (t.dtype) {
    case DType::f32:
      return f(static_cast<float*>(t.data) + offset);
    case DType::f64:
      if constexpr (sizeof(T) == sizeof(double)) f(static_cast<double*>(t.data) + offset);
      return;
    case DType::f16:
      return f(static_cast<Half*>(t.data) + offset);
    case DType::bf16:
      return f(static_cast<BFloat16*>(t.data) + offset);
  }
}

// The first `count` lanes of a vector; `Whole` says at compile time that these are all of them.
template <bool Whole>
struct Lanes {
  int count;
  template <class V, class S>
  V load(const S* from) const {
    return Whole ? V::load(from) : V::load(from, count);
  }
  template <class V, class S>
  void store(V v, S* to) const {
    Whole ? v.store(to) : v.store(to, count);
  }
};

// Calls f(first element, lanes) for each vector of `count` elements.
template <class V, class F>
void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) f(i, Lanes<true>{V::width});
  if (i < count) f(i, Lanes<false>{static_cast<int>(count - i)});
}

template <class V, class A, class B>
void copy_run(const A* from, B* to, int64_t count) {
  for_vectors<V>(count,
                 [&](int64_t i, auto lanes) { lanes.store(lanes.template load<V>(from + i), to + i); });
}

// Transposes (2 width, kTaps) values to (kTaps, 2 width), or back, in registers; load(j) and store(j, vector)
// access the j-th vector. Position kTaps i + k becomes 2 width k + i, which is 2 width times the old position
// modulo (number of values - 1). A perfect shuffle of the two halves doubles each position, modulo the same.
template <bool Back, int Times, class Load, class Store>
void transpose(const Load& load, const Store& store) {
  if constexpr (Times == 1) {
#pragma GCC unroll 18  // otherwise the vectors go through memory
    for (int j = 0; j < 2 * kTaps; ++j) store(j, load(j));
  } else {
    VecF v[2 * kTaps];
#pragma GCC unroll 9
    for (int j = 0; j < kTaps; ++j)
      Back ? deinterleave(load(2 * j), load(2 * j + 1), v[j], v[kTaps + j])
           : interleave(load(j), load(kTaps + j), v[2 * j], v[2 * j + 1]);
    transpose<Back, Times / 2>([&](int j) { return v[j]; }, store);
  }
}

// Copies a filter from any order and type to any other, converting through V's type.
template <class V, class A, class B>
void copy_filter(const Sizes& s, const A* from, Order in, B* to, Order out) {
  const auto source = [&](int64_t k) { return from + k / s.width * in.row + k % s.width * in.column; };
  const auto target = [&](int64_t k) { return to + k / s.width * out.row + k % s.width * out.column; };
  if (in == s.by_channel && out == s.by_channel) return copy_run<V>(from, to, s.values);
  if (in.channel == 1 && out.channel == 1) {
    for (int64_t k = 0; k < s.taps; ++k) copy_run<V>(source(k), target(k), s.inputs);
    return;
  }
  int64_t done = 0;  // channels that are copied already
  if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
    constexpr int W = VecF::width;
    const A* sources[kTaps];
    B* targets[kTaps];
    for (int k = 0; k < kTaps && s.taps == kTaps; ++k) sources[k] = source(k), targets[k] = target(k);
    if (s.taps == kTaps && in == s.by_channel && out.channel == 1)
      for (; done + 2 * W <= s.inputs; done += 2 * W)
        transpose<false, 2 * W>([&](int j) { return VecF::load(from + done * kTaps + j * W); },
                                [&](int j, VecF v) { v.store(targets[j / 2] + done + j % 2 * W); });
    if (s.taps == kTaps && in.channel == 1 && out == s.by_channel)
      for (; done + 2 * W <= s.inputs; done += 2 * W)
        transpose<true, 2 * W>([&](int j) { return VecF::load(sources[j / 2] + done + j % 2 * W); },
                               [&](int j, VecF v) { v.store(to + done * kTaps + j * W); });
  }
  for (int64_t k = 0; k < s.taps; ++k)
    for (int64_t i = done; i < s.inputs; ++i)
      put(static_cast<typename V::Scalar>(to_float(source(k)[i * in.channel])), target(k)[i * out.channel]);
}

// Returns a filter in the order and type of the arithmetic: in place if possible, else as a copy in `buffer`.
template <class V>
const typename V::Scalar* load_filter(const Sizes& s, const TensorView& t, int64_t filter,
                                      typename V::Scalar* buffer) {
  using T = typename V::Scalar;
  if (t.dtype == dtype_of<T>() && s.order_of(t) == s.order)
    return static_cast<const T*>(t.data) + filter * t.stride[0];
  with_filter<T>(t, filter,
                 [&](const auto* from) { copy_filter<V>(s, from, s.order_of(t), buffer, s.order); });
  return buffer;
}

// Calls fill(target) to write a filter in the order of the arithmetic: in place if possible, else in
// `buffer`, from which it is copied.
template <class V, class Fill>
void store_filter(const Sizes& s, const TensorView& t, int64_t filter, typename V::Scalar* buffer,
                  const Fill& fill) {
  const bool in_place = s.order_of(t) == s.order;
  if (!in_place) fill(buffer);
  with_filter<typename V::Scalar>(t, filter, [&](auto* to) {
    in_place ? fill(to) : copy_filter<V>(s, buffer, s.order, to, s.order_of(t));
  });
}

// Returns a sum over a filter's vectors, in a fixed order, with add(sum so far, index of the first value,
// index of its scale, lanes).
template <class V, class Add>
double sum_filter(const Sizes& s, const Add& add) {
  double total[V::width] = {};
  for (int64_t run = 0; run < s.values; run += s.length)
    for (int64_t first = 0; first < s.length; first += kElementsPerSum) {
      const int64_t left = s.length - first, count = left < kElementsPerSum ? left : kElementsPerSum;
      V sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
      int64_t i = first;
      for (; i + 4 * V::width <= first + count; i += 4 * V::width)
        for (int u = 0; u < 4; ++u)
          sum[u] = add(sum[u], run + i + u * V::width, i + u * V::width, Lanes<true>{V::width});
      for_vectors<V>(first + count - i,
                     [&](int64_t j, auto lanes) { sum[0] = add(sum[0], run + i + j, i + j, lanes); });
      typename V::Scalar lane[V::width];
      ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(lane);
      for (int k = 0; k < V::width; ++k) total[k] += static_cast<double>(lane[k]);
    }
  double sum = 0;
  for (double lane : total) sum += lane;
  return sum;
}

// Returns the scales of a run, for the filter's group.
template <class T>
const T* scales_of(const Sizes& s, int64_t filter, const T* scale, T* buffer) {
  scale += s.group(filter) * s.inputs;
  if (s.copies == 1) return scale;
  for (int64_t i = 0; i < s.inputs; ++i)
    for (int64_t k = 0; k < s.copies; ++k) buffer[i * s.copies + k] = scale[i];
  return buffer;
}

// Calls body(part, first filter, end of filters, scratch memory for `buffers` filters) for parts of a fixed
// size, on several threads.
template <class V, class Body>
void for_parts(const Sizes& s, int threads, int buffers, const Body& body) {
  using T = typename V::Scalar;
  if (s.filters * s.values < kElementsForThreads) threads = 1;
  const int64_t parts = ceil_div(s.filters, kFiltersPerPart);
  const int64_t per_thread = ceil_div(buffers * s.values, 16) * 16;  // in whole cache lines
  Buffer scratch(threads * per_thread * static_cast<int64_t>(sizeof(T)));
  T* memory = scratch.take<T>(threads * per_thread);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part)
        body(part, part * kFiltersPerPart, min_of(s.filters, (part + 1) * kFiltersPerPart),
             memory + thread * per_thread);
  });
}

template <class V>
void forward(const Forward& call, int threads) {
  using T = typename V::Scalar;
  const Sizes s(call.in);
  Buffer memory((s.groups * s.inputs + s.filters) * static_cast<int64_t>(sizeof(T)));
  T *scale = memory.take<T>(s.groups * s.inputs), *norm = memory.take<T>(s.filters);
  load_vector(call.in.scale, scale);
  for_parts<V>(s, threads, 3, [&](int64_t, int64_t first, int64_t last, T* scratch) {
    T *buffer = scratch, *result = buffer + s.values, *repeated = result + s.values;
    const T* scales = nullptr;
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1)) scales = scales_of(s, o, scale, repeated);
      const T* w = load_filter<V>(s, call.in.weight, o, buffer);
      const double n = ::sqrt(sum_filter<V>(s, [&](V sum, int64_t i, int64_t j, auto lanes) {
        const V v = lanes.template load<V>(w + i) * lanes.template load<V>(scales + j);
        return multiply_add(v, v, sum);
      }));
      const Ahead next_weight(call.in.weight, o + 1);
      const V factor = V::set(static_cast<T>(s.gain / (n + call.in.eps)));
      store_filter<V>(s, call.modulated, o, result, [&](auto* to) {
        for (int64_t run = 0; run < s.values; run += s.length)
          for_vectors<V>(s.length, [&](int64_t j, auto lanes) {
            next_weight.fetch(run + j);
            const V v = lanes.template load<V>(w + run + j) * lanes.template load<V>(scales + j);
            lanes.store(v * factor, to + run + j);
          });
      });
      norm[o] = static_cast<T>(n);
    }
  });
  store_vector(norm, call.in.norm);
}

// With v = scale w, d = norm + eps and D = sum g v, the gradient of v is gain (g / d - v D / (norm d^2)).
template <class V>
void backward(const Backward& call, int threads) {
  using T = typename V::Scalar;
  const Sizes s(call.in);
  const int64_t parts = ceil_div(s.filters, kFiltersPerPart), channels = s.groups * s.inputs;
  Buffer memory((parts * channels + s.filters) * static_cast<int64_t>(sizeof(double)) +
                (channels + s.filters) * static_cast<int64_t>(sizeof(T)));
  double *partial = memory.take<double>(parts * channels), *gain = memory.take<double>(s.filters);
  T *scale = memory.take<T>(channels), *norm = memory.take<T>(s.filters);
  load_vector(call.in.scale, scale);
  load_vector(call.in.norm, norm);
  for_parts<V>(s, threads, 5, [&](int64_t part, int64_t first, int64_t last, T* scratch) {
    T *w_buffer = scratch, *g_buffer = w_buffer + s.values, *result = g_buffer + s.values;
    T *repeated = result + s.values, *products = repeated + s.values;
    const T* scales = nullptr;
    double* scale_sums = partial + part * channels;
    for (int64_t i = 0; i < channels; ++i) scale_sums[i] = 0;
    int64_t added = 0;  // filters whose products are in `products`
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1)) scales = scales_of(s, o, scale, repeated);
      const T* w = load_filter<V>(s, call.in.weight, o, w_buffer);
      const T* g = load_filter<V>(s, call.grad, o, g_buffer);
      const double along = sum_filter<V>(s, [&](V sum, int64_t i, int64_t j, auto lanes) {
        const V v = lanes.template load<V>(w + i) * lanes.template load<V>(scales + j);
        return multiply_add(lanes.template load<V>(g + i), v, sum);
      });
      const double n = static_cast<double>(norm[o]), d = n + call.in.eps, outer = s.gain / d;
      const V a = V::set(static_cast<T>(outer));
      const V b = V::set(static_cast<T>(n > 0 ? -outer * (along / (n * d)) : 0.0));
      gain[o] = along / d;
      const Ahead next_weight(call.in.weight, o + 1), next_grad(call.grad, o + 1);
      if (added == 0)
        for (int64_t i = 0; i < s.length; ++i) products[i] = 0;
      store_filter<V>(s, call.grad_weight, o, result, [&](auto* to) {
        for (int64_t run = 0; run < s.values; run += s.length)
          for_vectors<V>(s.length, [&](int64_t j, auto lanes) {
            next_weight.fetch(run + j), next_grad.fetch(run + j);
            const V value = lanes.template load<V>(w + run + j), factor = lanes.template load<V>(scales + j);
            const V dv = multiply_add(b, value * factor, a * lanes.template load<V>(g + run + j));
            lanes.store(multiply_add(value, dv, lanes.template load<V>(products + j)), products + j);
            lanes.store(dv * factor, to + run + j);
          });
      });
      // As many filters as a channel has taps are added up in this type; their sums are added up in double.
      if (++added < s.copies && o + 1 < last && s.group(o) == s.group(o + 1)) continue;
      added = 0;
      double* sums = scale_sums + s.group(o) * s.inputs;
      for (int64_t i = 0; s.copies == 1 && i < s.inputs; ++i) sums[i] += static_cast<double>(products[i]);
      for (int64_t i = 0; s.copies != 1 && i < s.inputs; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < s.copies; ++k) sum += static_cast<double>(products[i * s.copies + k]);
        sums[i] += sum;
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < channels; ++i) partial[i] += partial[part * channels + i];
  store_vector(partial, call.grad_scale);
  if (call.grad_gain.data != nullptr) {
    double sum = 0;
    for (int64_t o = 0; o < s.filters; ++o) sum += gain[o];
    store_vector(&sum, call.grad_gain);
  }
}

bool in_double(const Inputs& in) { return in.norm.dtype == DType::f64; }

}  // namespace

void modulate_weight_forward(const Forward& call, int threads) {
  in_double(call.in) ? forward<VecN<double>>(call, threads) : forward<VecF>(call, threads);
}

void modulate_weight_backward(const Backward& call, int threads) {
  in_double(call.in) ? backward<VecN<double>>(call, threads) : backward<VecF>(call, threads);
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
