// Weight modulation on the CPU: one pass over the weight in either direction, a filter at a time, which stays
// in the first-level cache between its sum and its use.
//
// Compiled once an instruction set: only internal linkage and no library templates below.
#include <math.h>

#include <cstdlib>
#include <new>

#include "../common/convert.h"
#include "../common/parallel.h"
#include "smc.h"

namespace litevae {
namespace LITEVAE_ISA {
using smc::Backward;
using smc::Forward;
using smc::Inputs;

namespace {

constexpr int64_t kFiltersAPart = 16;  // whose contributions to the scales' gradients are added up together
constexpr int64_t kElementsForThreads = 1 << 14;  // a thread's start costs more than less work
constexpr int kLanes = 16;

template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count)
      : data(static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T) + 1))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

// One filter's values, input channel by input channel and tap by tap, whatever the layout of the weight.
template <class Move>
void for_rows(const TensorView& t, int64_t filter, const Move& move) {
  const int64_t inputs = t.size[1], height = t.size[2], width = t.size[3], bytes = element_size(t.dtype);
  char* base = static_cast<char*>(t.data) + filter * t.stride[0] * bytes;
  if (t.stride[3] == 1 && t.stride[2] == width && t.stride[1] == height * width)
    return move(base, 1, inputs * height * width, 0, 1);
  for (int64_t k = 0; k < height * width; ++k)
    move(base + (k / width * t.stride[2] + k % width * t.stride[3]) * bytes, t.stride[1], inputs, k,
         height * width);
}

template <class T>
void load_filter(const TensorView& t, int64_t filter, T* to, T* line) {
  for_rows(t, filter, [&](char* from, int64_t stride, int64_t count, int64_t first, int64_t step) {
    if (step == 1) return load_row(t.dtype, from, stride, count, 1, to);
    load_row(t.dtype, from, stride, count, 1, line);
    for (int64_t i = 0; i < count; ++i) to[first + i * step] = line[i];
  });
}

template <class T>
void store_filter(const TensorView& t, int64_t filter, const T* from, T* line) {
  for_rows(t, filter, [&](char* to, int64_t stride, int64_t count, int64_t first, int64_t step) {
    if (step == 1) return store_row(t.dtype, from, to, stride, count, 1);
    for (int64_t i = 0; i < count; ++i) line[i] = from[first + i * step];
    store_row(t.dtype, line, to, stride, count, 1);
  });
}

template <class T>
void load_vector(const TensorView& t, T* to) {
  load_row(t.dtype, static_cast<const char*>(t.data), t.stride[1], t.size[1], 1, to);
}

template <class T>
void store_vector(const T* from, const TensorView& t) {
  store_row(t.dtype, from, static_cast<char*>(t.data), t.stride[1], t.size[1], 1);
}

// In lanes, so that the compiler may vectorise it; the order of the additions is fixed.
template <class T>
double dot(const T* a, const T* b, int64_t count) {
  double sum = 0;
  for (int64_t first = 0; first < count; first += 1024) {
    const int64_t last = first + 1024 < count ? first + 1024 : count;
    T lane[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lane[k] += a[i + k] * b[i + k];
    for (; i < last; ++i) lane[i % kLanes] += a[i] * b[i];
    for (int k = 0; k < kLanes; ++k) sum += static_cast<double>(lane[k]);
  }
  return sum;
}

// Each tap's scale: scale[i] for all taps of input channel i of the filter's group.
template <class T>
void spread(const T* scale, int64_t inputs, int64_t taps, T* to) {
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t k = 0; k < taps; ++k) to[i * taps + k] = scale[i];
}

template <class T>
struct Sizes {
  int64_t filters, inputs, taps, values, groups;
  T gain;
  explicit Sizes(const Inputs& in)
      : filters(in.weight.size[0]),
        inputs(in.weight.size[1]),
        taps(in.weight.size[2] * in.weight.size[3]),
        values(inputs * taps),
        groups(in.groups()),
        gain(1) {
    if (in.gain.data != nullptr) load_vector(in.gain, &gain);
  }
  int64_t group(int64_t filter) const { return filter / (filters / groups); }
};

// body(part, first filter, last filter, scratch of `rows` filters) for parts of a fixed size on several
// threads.
template <class T, class Body>
void for_parts(const Sizes<T>& s, int threads, int rows, const Body& body) {
  if (s.filters * s.values < kElementsForThreads) threads = 1;
  const int64_t parts = (s.filters + kFiltersAPart - 1) / kFiltersAPart;
  bool out_of_memory = false;  // an exception must not leave a thread of the team
  parallel_for(parts, threads, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(rows * s.values);
    if (scratch.data == nullptr) return __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = (part + 1) * kFiltersAPart;
      body(part, part * kFiltersAPart, last < s.filters ? last : s.filters, scratch.data);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

template <class T>
void forward(const Forward& call, int threads) {
  const Sizes<T> s(call.in);
  Scratch<T> scale(s.groups * s.inputs), norm(s.filters);
  if (scale.data == nullptr || norm.data == nullptr) throw std::bad_alloc();
  load_vector(call.in.scale, scale.data);
  for_parts(s, threads, 3, [&](int64_t, int64_t first, int64_t last, T* scratch) {
    T *w = scratch, *scales = w + s.values, *line = scales + s.values;
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1))
        spread(scale.data + s.group(o) * s.inputs, s.inputs, s.taps, scales);
      load_filter(call.in.weight, o, w, line);
      for (int64_t i = 0; i < s.values; ++i) w[i] *= scales[i];
      const double n = ::sqrt(dot(w, w, s.values));
      const T factor = static_cast<T>(static_cast<double>(s.gain) / (n + call.in.eps));
      for (int64_t i = 0; i < s.values; ++i) w[i] *= factor;
      store_filter(call.modulated, o, w, line);
      norm.data[o] = static_cast<T>(n);
    }
  });
  store_vector(norm.data, call.in.norm);
}

// With v = scale w, d = norm + eps and D = sum g v: dv = gain (g / d - v D / (norm d^2)).
template <class T>
void backward(const Backward& call, int threads) {
  const Sizes<T> s(call.in);
  const int64_t parts = (s.filters + kFiltersAPart - 1) / kFiltersAPart, channels = s.groups * s.inputs;
  Scratch<T> scale(channels), norm(s.filters);
  Scratch<double> partial(parts * channels), gain(s.filters);
  if (!scale.data || !norm.data || !partial.data || !gain.data) throw std::bad_alloc();
  load_vector(call.in.scale, scale.data);
  load_vector(call.in.norm, norm.data);
  for_parts(s, threads, 4, [&](int64_t part, int64_t first, int64_t last, T* scratch) {
    T *w = scratch, *g = w + s.values, *scales = g + s.values, *line = scales + s.values;
    double* of_scale = partial.data + part * channels;
    for (int64_t i = 0; i < channels; ++i) of_scale[i] = 0;
    for (int64_t o = first; o < last; ++o) {
      if (o == first || s.group(o) != s.group(o - 1))
        spread(scale.data + s.group(o) * s.inputs, s.inputs, s.taps, scales);
      load_filter(call.in.weight, o, w, line);
      load_filter(call.grad, o, g, line);
      for (int64_t i = 0; i < s.values; ++i) line[i] = w[i] * scales[i];
      const double along = dot(g, line, s.values), n = static_cast<double>(norm.data[o]), d = n + call.in.eps;
      const double outer = static_cast<double>(s.gain) / d;
      const T a = static_cast<T>(outer), b = static_cast<T>(n > 0 ? outer * (along / (n * d)) : 0.0);
      gain.data[o] = along / d;
      for (int64_t i = 0; i < s.values; ++i) g[i] = a * g[i] - b * line[i];
      double* sums = of_scale + s.group(o) * s.inputs;
      for (int64_t i = 0; i < s.inputs; ++i) {
        T sum = 0;
        for (int64_t k = 0; k < s.taps; ++k) sum += w[i * s.taps + k] * g[i * s.taps + k];
        sums[i] += static_cast<double>(sum);
      }
      for (int64_t i = 0; i < s.values; ++i) g[i] *= scales[i];
      store_filter(call.grad_weight, o, g, line);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < channels; ++i) partial.data[i] += partial.data[part * channels + i];
  store_vector(partial.data, call.grad_scale);
  if (call.grad_gain.data != nullptr) {
    double sum = 0;
    for (int64_t o = 0; o < s.filters; ++o) sum += gain.data[o];
    store_vector(&sum, call.grad_gain);
  }
}

bool in_double(const Inputs& in) { return in.norm.dtype == DType::f64; }

}  // namespace

void modulate_weight_forward(const Forward& call, int threads) {
  in_double(call.in) ? forward<double>(call, threads) : forward<float>(call, threads);
}

void modulate_weight_backward(const Backward& call, int threads) {
  in_double(call.in) ? backward<double>(call, threads) : backward<float>(call, threads);
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
