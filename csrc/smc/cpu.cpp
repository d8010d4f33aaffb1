// Weight modulation on the CPU: one pass over the weight in either direction, a filter at a time, which stays
// in the first-level cache between its sum and its use.
//
// A filter is worked on in the weight's own order, as runs of adjacent values that have the same row of
// scales: a run for each tap where the channels are innermost, and one run, whose scales are repeated for the
// taps of a channel, where the taps are. What comes or goes in another order is transposed in vectors.
//
// Compiled once an instruction set: only internal linkage and no library templates below.
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

constexpr int64_t kFiltersAPart = 16;  // whose contributions to the scales' gradients are added up together
constexpr int64_t kElementsForThreads = 1 << 15;  // a thread's start costs more than less work
constexpr int kTaps = 9;                          // of the filters that are transposed in vectors: 3 x 3
constexpr int64_t kElementsASum = 1024;           // in the arithmetic's type; double from there on

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
  Order by_channel, order;  // taps innermost; the weight's own, or channels innermost
  int64_t length, copies;   // of a run, and of each scale in it

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
  // Dimensions of one element have any stride: here, that of `by_channel`.
  Order ordered(const TensorView& t, int64_t channel, int64_t row, int64_t column) const {
    return {t.size[1] == 1 ? taps : channel, t.size[2] == 1 ? width : row, t.size[3] == 1 ? 1 : column};
  }
  Order order_of(const TensorView& t) const { return ordered(t, t.stride[1], t.stride[2], t.stride[3]); }
  int64_t group(int64_t filter) const { return filter / (filters / groups); }
};

// A filter that is needed next: asked for, if it is dense, while the one before is written.
struct Ahead {
  const char* data;
  int64_t bytes;
  Ahead(const TensorView& t, int64_t filter)
      : data(static_cast<const char*>(t.data) + filter * t.stride[0] * element_size(t.dtype)),
        bytes(element_size(t.dtype)) {}
  void fetch(int64_t value) const { __builtin_prefetch(data + value * bytes); }
};

// f(pointer of the tensor's type to one of its filters); doubles come with arithmetic in double only
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

// The first `count` lanes of a vector; all of them where that is known from the start.
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

// f(first, lanes) for each vector of `count` elements
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

#if defined(LITEVAE_SIMD)
// Transposes (2 width, kTaps) values to (kTaps, 2 width), or back, in registers; load(j) and store(j, vector)
// are of the j-th vector. Place kTaps i + k becomes 2 width k + i, which is 2 width times as much, modulo the
// number of values less one; and the perfect shuffle of the halves doubles each place, modulo the same.
template <bool Back, int Times, class Load, class Store>
void transpose(const Load& load, const Store& store) {
  if constexpr (Times == 1) {
#pragma GCC unroll 18  // or the vectors go by way of memory
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
#endif

// From any order and type to any other, by way of V's type.
template <class V, class A, class B>
void copy_filter(const Sizes& s, const A* from, Order in, B* to, Order out) {
  const auto source = [&](int64_t k) { return from + k / s.width * in.row + k % s.width * in.column; };
  const auto target = [&](int64_t k) { return to + k / s.width * out.row + k % s.width * out.column; };
  if (in == s.by_channel && out == s.by_channel) return copy_run<V>(from, to, s.values);
  if (in.channel == 1 && out.channel == 1) {
    for (int64_t k = 0; k < s.taps; ++k) copy_run<V>(source(k), target(k), s.inputs);
    return;
  }
  int64_t done = 0;  // channels
#if defined(LITEVAE_SIMD)
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
#endif
  for (int64_t k = 0; k < s.taps; ++k)
    for (int64_t i = done; i < s.inputs; ++i)
      put(static_cast<typename V::Scalar>(to_float(source(k)[i * in.channel])), target(k)[i * out.channel]);
}

// A filter in the order and type of the arithmetic: where it stands, or else in `room`.
template <class V>
const typename V::Scalar* load_filter(const Sizes& s, const TensorView& t, int64_t filter,
                                      typename V::Scalar* room) {
  using T = typename V::Scalar;
  if (t.dtype == dtype_of<T>() && s.order_of(t) == s.order)
    return static_cast<const T*>(t.data) + filter * t.stride[0];
  with_filter<T>(t, filter, [&](const auto* from) { copy_filter<V>(s, from, s.order_of(t), room, s.order); });
  return room;
}

// fill(where) writes a filter in the order of the arithmetic, there or in `room`.
template <class V, class Fill>
void store_filter(const Sizes& s, const TensorView& t, int64_t filter, typename V::Scalar* room,
                  const Fill& fill) {
  const bool there = s.order_of(t) == s.order;
  if (!there) fill(room);
  with_filter<typename V::Scalar>(
      t, filter, [&](auto* to) { there ? fill(to) : copy_filter<V>(s, room, s.order, to, s.order_of(t)); });
}

// The sum over a filter's vectors: add(sum so far, first value, its scale, lanes). The order is fixed.
template <class V, class Add>
double sum_filter(const Sizes& s, const Add& add) {
  double total[V::width] = {};
  for (int64_t run = 0; run < s.values; run += s.length)
    for (int64_t first = 0; first < s.length; first += kElementsASum) {
      const int64_t left = s.length - first, count = left < kElementsASum ? left : kElementsASum;
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

// The scales of a run, of the filter's group.
template <class T>
const T* scales_of(const Sizes& s, int64_t filter, const T* scale, T* room) {
  scale += s.group(filter) * s.inputs;
  if (s.copies == 1) return scale;
  for (int64_t i = 0; i < s.inputs; ++i)
    for (int64_t k = 0; k < s.copies; ++k) room[i * s.copies + k] = scale[i];
  return room;
}

// body(part, first filter, last filter, scratch of `rooms` filters) for parts of a fixed size on several
// threads.
template <class V, class Body>
void for_parts(const Sizes& s, int threads, int rooms, const Body& body) {
  using T = typename V::Scalar;
  if (s.filters * s.values < kElementsForThreads) threads = 1;
  const int64_t parts = ceil_div(s.filters, kFiltersAPart);
  const int64_t a_thread = ceil_div(rooms * s.values, 16) * 16;  // whole cache lines
  Buffer scratch(threads * a_thread * static_cast<int64_t>(sizeof(T)));
  T* memory = scratch.take<T>(threads * a_thread);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part)
        body(part, part * kFiltersAPart, least(s.filters, (part + 1) * kFiltersAPart),
             memory + thread * a_thread);
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
    T *room = scratch, *result = room + s.values, *repeated = result + s.values;
    const T* scales = nullptr;
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1)) scales = scales_of(s, o, scale, repeated);
      const T* w = load_filter<V>(s, call.in.weight, o, room);
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

// With v = scale w, d = norm + eps and D = sum g v: dv = gain (g / d - v D / (norm d^2)).
template <class V>
void backward(const Backward& call, int threads) {
  using T = typename V::Scalar;
  const Sizes s(call.in);
  const int64_t parts = ceil_div(s.filters, kFiltersAPart), channels = s.groups * s.inputs;
  Buffer memory((parts * channels + s.filters) * static_cast<int64_t>(sizeof(double)) +
                (channels + s.filters) * static_cast<int64_t>(sizeof(T)));
  double *partial = memory.take<double>(parts * channels), *gain = memory.take<double>(s.filters);
  T *scale = memory.take<T>(channels), *norm = memory.take<T>(s.filters);
  load_vector(call.in.scale, scale);
  load_vector(call.in.norm, norm);
  for_parts<V>(s, threads, 5, [&](int64_t part, int64_t first, int64_t last, T* scratch) {
    T *w_room = scratch, *g_room = w_room + s.values, *result = g_room + s.values;
    T *repeated = result + s.values, *products = repeated + s.values;
    const T* scales = nullptr;
    double* of_scale = partial + part * channels;
    for (int64_t i = 0; i < channels; ++i) of_scale[i] = 0;
    int64_t added = 0;  // filters in `products`
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1)) scales = scales_of(s, o, scale, repeated);
      const T* w = load_filter<V>(s, call.in.weight, o, w_room);
      const T* g = load_filter<V>(s, call.grad, o, g_room);
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
      // as many filters as add up a channel's taps in this type, and double from there on
      if (++added < s.copies && o + 1 < last && s.group(o) == s.group(o + 1)) continue;
      added = 0;
      double* sums = of_scale + s.group(o) * s.inputs;
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
  in_double(call.in) ? forward<VecN<double>>(call, threads) : forward<VecFloat>(call, threads);
}

void modulate_weight_backward(const Backward& call, int threads) {
  in_double(call.in) ? backward<VecN<double>>(call, threads) : backward<VecFloat>(call, threads);
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
