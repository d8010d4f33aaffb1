// GroupNorm+SiLU on the CPU. Statistics first, then the result, a few images at a time, so that the second
// pass reads what the first one left in the cache.
//
// Every inner loop runs over a strip: vectors at equal distances that share their coefficients. With channels
// innermost a strip is one run of channels at successive pixels, and each lane has a channel; with pixels
// innermost it is one channel's pixels. The work is cut into blocks by the shape alone, so any number of
// threads gives the same bits.
//
// Compiled once an instruction set: only internal linkage and no library templates below.
#include <math.h>

#include <stdexcept>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "group_norm_silu.h"

namespace litevae {
namespace LITEVAE_ISA {
using group_norm_silu::Backward;
using group_norm_silu::Forward;
using group_norm_silu::Inputs;

namespace {

constexpr int64_t kPixelsAChunk = 128;            // channels innermost: summed in the storage's precision
constexpr int64_t kVectorsAChunk = 128;           // pixels innermost
constexpr int64_t kElementsABlock = 1 << 15;      // a thread's smallest piece
constexpr int64_t kBytesAThread = 512 << 10;      // of the inputs: half of a second-level cache
constexpr int64_t kElementsForThreads = 1 << 15;  // a thread's start costs more than less work

// What one call's tensors have in common. Pixels stand in `rows` of `length` that are evenly spaced in all of
// them.
struct Shape {
  int64_t batch, channels, split, pixels, length, groups;
  bool channels_innermost;
  int64_t block, blocks;  // pixels a block, and blocks an image (or plane)

  int64_t units() const { return (channels_innermost ? 1 : channels) * blocks; }  // an image
  int64_t first(int64_t b) const { return b * block; }
  int64_t last(int64_t b) const { return least(pixels, (b + 1) * block); }
};

template <class S>
struct Plane {
  S* data;
  int64_t n, c, row, pixel;

  S* at(const Shape& shape, int64_t image, int64_t channel, int64_t p) const {
    return data + image * n + channel * c + p / shape.length * row + p % shape.length * pixel;
  }
};

template <class S>
Plane<S> plane(const TensorView& t) {
  return {static_cast<S*>(t.data), t.stride[0], t.stride[1], t.stride[2], t.stride[3]};
}

// x and skip, or their gradients, side by side.
template <class S>
struct Pair {
  Plane<S> x, skip;
  const Plane<S>& of(const Shape& shape, int64_t& channel) const {
    if (channel < shape.split) return x;
    channel -= shape.split;
    return skip;
  }
};

// Where rows have one pixel each, their pixels make one row.
TensorView turned(TensorView t) {
  if (t.data != nullptr && t.size[3] == 1) {
    t.size[3] = t.size[2], t.stride[3] = t.stride[2];
    t.size[2] = 1;
  }
  return t;
}
Inputs turned(Inputs in) {
  in.x = turned(in.x), in.skip = turned(in.skip);
  return in;
}

Shape shape_of(const Inputs& in, const TensorView* const* tensors, int count) {
  Shape s{};
  s.batch = in.batch(), s.channels = in.channels(), s.split = in.x.size[1];
  s.pixels = in.height() * in.width(), s.length = in.width(), s.groups = in.groups;
  bool flat = true, by_channel = true, by_pixel = true;
  for (int i = 0; i < count; ++i) {
    const TensorView& t = *tensors[i];
    if (t.data == nullptr) continue;
    flat = flat && (t.size[2] == 1 || t.stride[2] == t.size[3] * t.stride[3]);
    by_channel = by_channel && (t.size[1] == 1 || t.stride[1] == 1);
    by_pixel = by_pixel && (t.size[3] == 1 || t.stride[3] == 1);
  }
  if (!by_channel && !by_pixel)
    throw std::invalid_argument("neither channels nor pixels are innermost in all tensors");
  if (flat) s.length = s.pixels;
  s.channels_innermost = by_channel && (!by_pixel || in.width() == 1);
  s.block = s.channels_innermost
                ? most(1, least(1024, kElementsABlock / s.channels) / kPixelsAChunk) * kPixelsAChunk
                : kElementsABlock;
  s.blocks = ceil_div(s.pixels, s.block);
  return s;
}

// ---------------------------------------------------------------------------------------------------------------
// Strips: U vectors side by side, `count` times, `step` elements apart; `lanes` of each count (U is 1 where
// that is not all of them).

// A strip's vectors side by side, as a type, and whether all lanes of them count.
template <int U, bool W>
struct Width {
  static constexpr int value = U;
  static constexpr bool whole = W;
};

template <class V, bool Whole, class S>
V get(const S* from, int lanes) {
  return Whole ? V::load(from) : V::load(from, lanes);
}
template <bool Whole, class V, class S>
void set(V value, S* to, int lanes) {
  Whole ? value.store(to) : value.store(to, lanes);
}

template <class V, class W, class S>
void add_strip(const S* x, int64_t step, int64_t count, int lanes, V* sum) {
  constexpr int U = W::value;
  for (int u = 0; u < U; ++u) sum[u] = V::set(0);
  for (int64_t i = 0; i < count; ++i, x += step)
    for (int u = 0; u < U; ++u) sum[u] = sum[u] + get<V, W::whole>(x + u * V::width, lanes);
}

// Sums of x - shift and of its square.
template <class V, class W, class S>
void moment_strip(const S* x, int64_t step, int64_t count, int lanes, const V* shift, V* sum, V* square) {
  constexpr int U = W::value;
  V k[U], s[U], q[U];
  for (int u = 0; u < U; ++u) k[u] = shift[u], s[u] = V::set(0), q[u] = V::set(0);
  for (int64_t i = 0; i < count; ++i, x += step) {
    for (int u = 0; u < U; ++u) {
      const V d = get<V, W::whole>(x + u * V::width, lanes) - k[u];
      s[u] = s[u] + d, q[u] = multiply_add(d, d, q[u]);
    }
  }
  for (int u = 0; u < U; ++u) sum[u] = s[u], square[u] = q[u];
}

// Coefficients of each channel. The mean is the sum of a number of type T and of what that lacks, so that x -
// mean keeps its digits at any mean.
enum ForwardRow { kMean, kFactor, kOffset, kForwardRows };
enum BackwardRow { kMeanB, kRstd, kRest, kWeight, kBias, kSlope, kConstant, kLinear, kBackwardRows };

template <class V, class W, class S>
void forward_strip(const S* x, int64_t x_step, S* y, int64_t y_step, int64_t count, int lanes,
                   const V* rows) {
  constexpr int U = W::value;
  V c[kForwardRows * U];
  for (int i = 0; i < kForwardRows * U; ++i) c[i] = rows[i];
  for (int64_t i = 0; i < count; ++i, x += x_step, y += y_step) {
    V z[U], divisor[U];
    for (int u = 0; u < U; ++u)
      z[u] = multiply_add(get<V, W::whole>(x + u * V::width, lanes) - c[kMean * U + u], c[kFactor * U + u],
                          c[kOffset * U + u]);
    one_plus_exp_minus<U>(z, divisor);
    for (int u = 0; u < U; ++u) set<W::whole>(z[u] / divisor[u], y + u * V::width, lanes);
  }
}

// The normalised x, and the gradient of the SiLU's input, of one place.
template <class V, class W, class S>
void derivative(const S* x, const S* g, int lanes, const V* c, V* normalised, V* dz) {
  constexpr int U = W::value;
  V z[U], divisor[U];
  for (int u = 0; u < U; ++u) {
    const V d = get<V, W::whole>(x + u * V::width, lanes) - c[kMeanB * U + u];
    normalised[u] = multiply_add(d, c[kRstd * U + u], c[kRest * U + u]);
    z[u] = multiply_add(normalised[u], c[kWeight * U + u], c[kBias * U + u]);
  }
  one_plus_exp_minus<U>(z, divisor);
  for (int u = 0; u < U; ++u) {
    const V s = V::set(1) / divisor[u];
    // s (1 + z (1 - s))
    dz[u] = get<V, W::whole>(g + u * V::width, lanes) * multiply_add(s, z[u] - z[u] * s, s);
  }
}

template <class V, class W, class S>
void sums_strip(const S* x, int64_t x_step, const S* g, int64_t g_step, int64_t count, int lanes,
                const V* rows, V* sum, V* product) {
  constexpr int U = W::value;
  V c[kSlope * U], a[U], b[U];
  for (int i = 0; i < kSlope * U; ++i) c[i] = rows[i];
  for (int u = 0; u < U; ++u) a[u] = V::set(0), b[u] = V::set(0);
  for (int64_t i = 0; i < count; ++i, x += x_step, g += g_step) {
    V normalised[U], dz[U];
    derivative<V, W>(x, g, lanes, c, normalised, dz);
    for (int u = 0; u < U; ++u) a[u] = a[u] + dz[u], b[u] = multiply_add(dz[u], normalised[u], b[u]);
  }
  for (int u = 0; u < U; ++u) sum[u] = a[u], product[u] = b[u];
}

template <class V, class W, class S>
void backward_strip(const S* x, int64_t x_step, const S* g, int64_t g_step, S* dx, int64_t dx_step,
                    int64_t count, int lanes, const V* rows) {
  constexpr int U = W::value;
  V c[kBackwardRows * U];
  for (int i = 0; i < kBackwardRows * U; ++i) c[i] = rows[i];
  for (int64_t i = 0; i < count; ++i, x += x_step, g += g_step, dx += dx_step) {
    V normalised[U], dz[U];
    derivative<V, W>(x, g, lanes, c, normalised, dz);
    for (int u = 0; u < U; ++u) {
      const V mean = multiply_add(normalised[u], c[kLinear * U + u], c[kConstant * U + u]);
      set<W::whole>(multiply_add(dz[u], c[kSlope * U + u], mean), dx + u * V::width, lanes);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// From strips to blocks.

// f(Width, first, lanes) for runs of U vectors of the `count` elements that stand side by side.
template <class V, class F>
void for_runs(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 * V::width <= count; i += 4 * V::width) f(Width<4, true>(), i, V::width);
  if (i + 2 * V::width <= count) f(Width<2, true>(), i, V::width), i += 2 * V::width;
  if (i + V::width <= count) f(Width<1, true>(), i, V::width), i += V::width;
  if (i < count) f(Width<1, false>(), i, static_cast<int>(count - i));
}

// f(Width, first, vectors, lanes) for the strips that `count` successive elements make.
template <class V, class F>
void for_strips(int64_t count, const F& f) {
  const int64_t wide = count / (4 * V::width), left = count - wide * 4 * V::width, narrow = left / V::width;
  if (wide > 0) f(Width<4, true>(), int64_t{0}, wide, V::width);
  if (narrow > 0) f(Width<1, true>(), count - left, narrow, V::width);
  const int rest = static_cast<int>(left - narrow * V::width);
  if (rest > 0) f(Width<1, false>(), count - rest, int64_t{1}, rest);
}

// f(pixel, count) for runs of at most `chunk` pixels of one row.
template <class F>
void for_chunks(const Shape& s, int64_t block, int64_t chunk, const F& f) {
  const int64_t last = s.last(block);
  for (int64_t p = s.first(block); p < last;) {
    const int64_t count = least(least(chunk, s.length - p % s.length), last - p);
    f(p, count);
    p += count;
  }
}

// `count` coefficients of each of the first `Rows` rows, from a channel on or, in every lane, of one channel.
template <class V, int U, int Rows>
void load_rows(const typename V::Scalar* table, int64_t channels, int64_t channel, bool one, V* rows) {
  for (int r = 0; r < Rows; ++r)
    for (int u = 0; u < U; ++u) {
      const typename V::Scalar* from = table + r * channels + channel;
      rows[r * U + u] = one ? V::set(*from) : V::load(from + u * V::width);
    }
}

// f(segment's channels, its first channel): x and then skip.
template <class F>
void for_segments(const Shape& s, const F& f) {
  if (s.split > 0) f(s.split, int64_t{0});
  if (s.channels > s.split) f(s.channels - s.split, s.split);
}

// Means and sums of squared differences of `more` values join those of `count` (Chan, Golub and LeVeque
// 1983). The mean that joins is the sum of two numbers, of which the second may be missing.
template <class T>
void merge(double count, double* mean, double* m2, double more, const T* more_mean, const T* rest,
           const T* more_m2, int64_t channels) {
  const double share = more / (count + more), weight = count * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double joins =
        static_cast<double>(more_mean[c]) + (rest == nullptr ? 0.0 : static_cast<double>(rest[c]));
    const double delta = joins - mean[c];
    mean[c] += delta * share;
    m2[c] += static_cast<double>(more_m2[c]) + delta * delta * weight;
  }
}

template <class V>
double sum_of_lanes(V v) {
  typename V::Scalar lane[V::width];
  v.store(lane);
  double sum = 0;
  for (int i = 0; i < V::width; ++i) sum += static_cast<double>(lane[i]);
  return sum;
}

// Mean and sum of squared differences of one block, for each of its channels.
//
// They are summed about the mean of an eighth of the chunk itself: then the sum of squares is at most nine
// times what it is about the mean, whatever the values are, and little cancels.
template <class V, class S>
void moments(const Shape& s, const Pair<const S>& in, int64_t n, int64_t unit, double* mean, double* m2) {
  using T = typename V::Scalar;
  double seen = 0;
  if (s.channels_innermost) {
    for (int64_t c = 0; c < s.channels; ++c) mean[c] = m2[c] = 0;
    for_chunks(s, unit, kPixelsAChunk, [&](int64_t p, int64_t count) {
      for_segments(s, [&](int64_t channels, int64_t first) {
        const Plane<const S>& t = first < s.split ? in.x : in.skip;
        const S* base = t.at(s, n, 0, p);
        for_runs<V>(channels, [&](auto width, int64_t c, int lanes) {
          constexpr int U = decltype(width)::value;
          const int64_t sampled = ceil_div(count, 8);
          V shift[U], sum[U], square[U];
          add_strip<V, decltype(width)>(base + c, t.pixel, sampled, lanes, shift);
          for (int u = 0; u < U; ++u) shift[u] = shift[u] * V::set(T(1) / static_cast<T>(sampled));
          moment_strip<V, decltype(width)>(base + c, t.pixel, count, lanes, shift, sum, square);
          const V share = V::set(T(1) / static_cast<T>(count));
          T chunk_mean[U * V::width], rest[U * V::width], chunk_m2[U * V::width];
          for (int u = 0; u < U; ++u) {
            const V m = sum[u] * share;
            shift[u].store(chunk_mean + u * V::width), m.store(rest + u * V::width);
            (square[u] - sum[u] * m).store(chunk_m2 + u * V::width);
          }
          const int64_t valid = U == 1 ? lanes : U * V::width;
          merge(seen, mean + first + c, m2 + first + c, static_cast<double>(count), chunk_mean, rest,
                chunk_m2, valid);
        });
      });
      seen += static_cast<double>(count);
    });
    return;
  }
  int64_t c = unit / s.blocks;
  const int64_t b = unit % s.blocks;
  mean += c, m2 += c;
  *mean = *m2 = 0;
  const Plane<const S>& t = in.of(s, c);
  for_chunks(s, b, kVectorsAChunk * V::width, [&](int64_t p, int64_t count) {
    const S* base = t.at(s, n, c, p);
    const int64_t sampled = ceil_div(count, 8);
    double shift = 0, sum = 0, square = 0;
    for_strips<V>(sampled, [&](auto width, int64_t i, int64_t vectors, int lanes) {
      constexpr int U = decltype(width)::value;
      V part[U];
      add_strip<V, decltype(width)>(base + i, U * V::width, vectors, lanes, part);
      for (int u = 0; u < U; ++u) shift += sum_of_lanes(part[u]);
    });
    const T k = static_cast<T>(shift / static_cast<double>(sampled));
    const int64_t whole = count / V::width * V::width;
    for_strips<V>(whole, [&](auto width, int64_t i, int64_t vectors, int lanes) {
      constexpr int U = decltype(width)::value;
      V shifts[U], s1[U], s2[U];
      for (int u = 0; u < U; ++u) shifts[u] = V::set(k);
      moment_strip<V, decltype(width)>(base + i, U * V::width, vectors, lanes, shifts, s1, s2);
      for (int u = 0; u < U; ++u) sum += sum_of_lanes(s1[u]), square += sum_of_lanes(s2[u]);
    });
    for (int64_t i = whole; i < count; ++i) {
      const double d = static_cast<double>(to_float(base[i])) - static_cast<double>(k);
      sum += d, square += d * d;
    }
    const double many = static_cast<double>(count), start = static_cast<double>(k), rest = sum / many,
                 chunk_m2 = square - sum * rest;
    merge(seen, mean, m2, many, &start, &rest, &chunk_m2, 1);
    seen += many;
  });
}

double value(const TensorView& t, int64_t channel, double missing) {
  if (t.data == nullptr) return missing;
  double v;
  load_row(t.dtype, static_cast<const char*>(t.data) + channel * t.stride[1] * element_size(t.dtype), 1, 1, 1,
           &v);
  return v;
}

void put_value(double v, const TensorView& t, int64_t channel) {
  store_row(t.dtype, &v, static_cast<char*>(t.data) + channel * t.stride[1] * element_size(t.dtype), 1, 1, 1);
}

// The statistics of one image's groups from those of its blocks, and the coefficients of its channels.
template <class T>
void finish_moments(const Shape& s, const Forward& call, int64_t n, double* mean, double* m2, T* table,
                    int64_t stride) {
  for (int64_t b = 1; b < s.blocks; ++b)
    merge(static_cast<double>(s.first(b)), mean, m2, static_cast<double>(s.last(b) - s.first(b)),
          mean + 2 * b * s.channels, static_cast<const double*>(nullptr), m2 + 2 * b * s.channels,
          s.channels);
  const int64_t each = s.channels / s.groups;
  const double pixels = static_cast<double>(s.pixels);
  for (int64_t g = 0; g < s.groups; ++g) {
    double group_mean = 0, group_m2 = 0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) group_mean += mean[c];
    group_mean /= static_cast<double>(each);
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      const double delta = mean[c] - group_mean;
      group_m2 += m2[c] + pixels * delta * delta;
    }
    const double variance = group_m2 / (pixels * static_cast<double>(each));
    // a sum of squares a little below zero is zero; a NaN stays
    const double rstd = 1 / ::sqrt((variance < 0 ? 0 : variance) + call.eps);
    double* stats = call.in.stats + 2 * (n * s.groups + g);
    stats[0] = group_mean, stats[1] = rstd;
    const T high = static_cast<T>(group_mean);
    const double low = group_mean - static_cast<double>(high);
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      const double factor = rstd * value(call.in.weight, c, 1);
      table[kMean * stride + c] = high;
      table[kFactor * stride + c] = static_cast<T>(factor);
      table[kOffset * stride + c] = static_cast<T>(value(call.in.bias, c, 0) - low * factor);
    }
  }
}

template <class V, class S>
void write_forward(const Shape& s, const Pair<const S>& in, const Plane<S>& y, int64_t n, int64_t unit,
                   const typename V::Scalar* table, int64_t stride) {
  if (s.channels_innermost) {
    for_chunks(s, unit, kPixelsAChunk, [&](int64_t p, int64_t count) {
      for_segments(s, [&](int64_t channels, int64_t first) {
        const Plane<const S>& t = first < s.split ? in.x : in.skip;
        const S* from = t.at(s, n, 0, p);
        S* to = y.at(s, n, first, p);
        for_runs<V>(channels, [&](auto width, int64_t c, int lanes) {
          constexpr int U = decltype(width)::value;
          V rows[kForwardRows * U];
          load_rows<V, U, kForwardRows>(table, stride, first + c, false, rows);
          forward_strip<V, decltype(width)>(from + c, t.pixel, to + c, y.pixel, count, lanes, rows);
        });
      });
    });
    return;
  }
  const int64_t channel = unit / s.blocks;
  int64_t c = channel;
  const Plane<const S>& t = in.of(s, c);
  for_chunks(s, unit % s.blocks, s.pixels, [&](int64_t p, int64_t count) {
    for_strips<V>(count, [&](auto width, int64_t i, int64_t vectors, int lanes) {
      constexpr int U = decltype(width)::value;
      V rows[kForwardRows * U];
      load_rows<V, U, kForwardRows>(table, stride, channel, true, rows);
      forward_strip<V, decltype(width)>(t.at(s, n, c, p) + i, U * V::width, y.at(s, n, channel, p) + i,
                                        U * V::width, vectors, lanes, rows);
    });
  });
}

template <class V>
int64_t padded(int64_t channels) {
  return ceil_div(channels, V::width) * V::width +
         V::width;  // a whole vector may be read at the last channel
}

// Calls body(image, unit) for all units of the images [first, last), on the same thread in each pass. The
// second pass goes backwards: what the first one read last may still be in the cache.
template <class Body>
void for_units(const Shape& s, int64_t first, int64_t last, int threads, bool backwards, const Body& body) {
  parallel_for((last - first) * s.units(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = backwards ? begin + end - 1 - k : k;
      body(first + i / s.units(), i % s.units());
    }
  });
}

int64_t images_at_once(const Shape& s, int64_t bytes_an_element, int threads) {
  return most(1, least(s.batch, threads * kBytesAThread / (bytes_an_element * s.channels * s.pixels)));
}

template <class V, class S>
void forward(const Forward& call, int threads) {
  using T = typename V::Scalar;
  const TensorView* tensors[] = {&call.in.x, &call.in.skip, &call.y};
  const Shape s = shape_of(call.in, tensors, 3);
  if (s.batch * s.channels * s.pixels < kElementsForThreads) threads = 1;
  const Pair<const S> in{plane<const S>(call.in.x), plane<const S>(call.in.skip)};
  const Plane<S> y = plane<S>(call.y);
  const int64_t wave = images_at_once(s, sizeof(S), threads), stride = padded<V>(s.channels);
  const int64_t an_image = 2 * s.blocks * s.channels;  // each block's means, then its sums of squares
  Buffer scratch(wave * (an_image * static_cast<int64_t>(sizeof(double)) +
                         kForwardRows * stride * static_cast<int64_t>(sizeof(T))));
  double* partial = scratch.take<double>(wave * an_image);
  T* tables = scratch.take<T>(wave * kForwardRows * stride);
  for (int64_t first = 0; first < s.batch; first += wave) {
    const int64_t last = least(s.batch, first + wave);
    for_units(s, first, last, threads, false, [&](int64_t n, int64_t unit) {
      const int64_t block = s.channels_innermost ? unit : unit % s.blocks;
      double* mean = partial + (n - first) * an_image + 2 * block * s.channels;
      moments<V>(s, in, n, unit, mean, mean + s.channels);
    });
    parallel_for(last - first, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* mean = partial + i * an_image;
        finish_moments(s, call, first + i, mean, mean + s.channels, tables + i * kForwardRows * stride,
                       stride);
      }
    });
    for_units(s, first, last, threads, true, [&](int64_t n, int64_t unit) {
      write_forward<V>(s, in, y, n, unit, tables + (n - first) * kForwardRows * stride, stride);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Backward.

// Coefficients that the statistics give; the rest follow from the sums.
template <class T>
void start_table(const Shape& s, const Backward& call, int64_t n, T* table, int64_t stride) {
  const int64_t each = s.channels / s.groups;
  for (int64_t c = 0; c < s.channels; ++c) {
    const double* stats = call.in.stats + 2 * (n * s.groups + c / each);
    const T high = static_cast<T>(stats[0]);
    const double low = stats[0] - static_cast<double>(high), weight = value(call.in.weight, c, 1);
    table[kMeanB * stride + c] = high;
    table[kRstd * stride + c] = static_cast<T>(stats[1]);
    table[kRest * stride + c] = static_cast<T>(-low * stats[1]);
    table[kWeight * stride + c] = static_cast<T>(weight);
    table[kBias * stride + c] = static_cast<T>(value(call.in.bias, c, 0));
    table[kSlope * stride + c] = static_cast<T>(stats[1] * weight);
  }
}

// Sums over a block of dz (the gradient of the SiLU's input) and of dz times the normalised x.
template <class V, class S>
void sums(const Shape& s, const Pair<const S>& in, const Plane<const S>& grad, int64_t n, int64_t unit,
          const typename V::Scalar* table, int64_t stride, double* sum, double* product) {
  using T = typename V::Scalar;
  if (s.channels_innermost) {
    for (int64_t c = 0; c < s.channels; ++c) sum[c] = product[c] = 0;
    for_chunks(s, unit, kPixelsAChunk, [&](int64_t p, int64_t count) {
      for_segments(s, [&](int64_t channels, int64_t first) {
        const Plane<const S>& t = first < s.split ? in.x : in.skip;
        const S *x = t.at(s, n, 0, p), *g = grad.at(s, n, first, p);
        for_runs<V>(channels, [&](auto width, int64_t c, int lanes) {
          constexpr int U = decltype(width)::value;
          V rows[kSlope * U], a[U], b[U];
          load_rows<V, U, kSlope>(table, stride, first + c, false, rows);
          sums_strip<V, decltype(width)>(x + c, t.pixel, g + c, grad.pixel, count, lanes, rows, a, b);
          T chunk[2][U * V::width];
          for (int u = 0; u < U; ++u)
            a[u].store(chunk[0] + u * V::width), b[u].store(chunk[1] + u * V::width);
          const int64_t valid = U == 1 ? lanes : U * V::width;
          for (int64_t i = 0; i < valid; ++i) {
            sum[first + c + i] += static_cast<double>(chunk[0][i]);
            product[first + c + i] += static_cast<double>(chunk[1][i]);
          }
        });
      });
    });
    return;
  }
  const int64_t channel = unit / s.blocks;
  int64_t c = channel;
  const Plane<const S>& t = in.of(s, c);
  double total = 0, total_product = 0;
  for_chunks(s, unit % s.blocks, kVectorsAChunk * V::width, [&](int64_t p, int64_t count) {
    for_strips<V>(count, [&](auto width, int64_t i, int64_t vectors, int lanes) {
      constexpr int U = decltype(width)::value;
      V rows[kSlope * U], a[U], b[U];
      load_rows<V, U, kSlope>(table, stride, channel, true, rows);
      // lanes beyond the end have a gradient of zero
      sums_strip<V, decltype(width)>(t.at(s, n, c, p) + i, U * V::width, grad.at(s, n, channel, p) + i,
                                     U * V::width, vectors, lanes, rows, a, b);
      for (int u = 0; u < U; ++u) total += sum_of_lanes(a[u]), total_product += sum_of_lanes(b[u]);
    });
  });
  sum[channel] = total, product[channel] = total_product;
}

// One image's sums from those of its blocks, into the first block's; and what they give to grad_x.
template <class T>
void finish_sums(const Shape& s, const Backward& call, int64_t n, double* sum, double* product, T* table,
                 int64_t stride) {
  for (int64_t b = 1; b < s.blocks; ++b)
    for (int64_t c = 0; c < s.channels; ++c)
      sum[c] += sum[2 * b * s.channels + c], product[c] += product[2 * b * s.channels + c];
  const int64_t each = s.channels / s.groups;
  const double many = static_cast<double>(s.pixels * each);
  for (int64_t g = 0; g < s.groups; ++g) {
    double constant = 0, linear = 0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      const double weight = value(call.in.weight, c, 1);
      constant += weight * sum[c], linear += weight * product[c];
    }
    const double rstd = call.in.stats[2 * (n * s.groups + g) + 1];
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      table[kConstant * stride + c] = static_cast<T>(-rstd * constant / many);
      table[kLinear * stride + c] = static_cast<T>(-rstd * linear / many);
    }
  }
}

template <class V, class S>
void write_backward(const Shape& s, const Pair<const S>& in, const Plane<const S>& grad, const Pair<S>& out,
                    int64_t n, int64_t unit, const typename V::Scalar* table, int64_t stride) {
  if (s.channels_innermost) {
    for_chunks(s, unit, kPixelsAChunk, [&](int64_t p, int64_t count) {
      for_segments(s, [&](int64_t channels, int64_t first) {
        const Plane<const S>& t = first < s.split ? in.x : in.skip;
        const Plane<S>& to = first < s.split ? out.x : out.skip;
        const S *x = t.at(s, n, 0, p), *g = grad.at(s, n, first, p);
        S* dx = to.at(s, n, 0, p);
        for_runs<V>(channels, [&](auto width, int64_t c, int lanes) {
          constexpr int U = decltype(width)::value;
          V rows[kBackwardRows * U];
          load_rows<V, U, kBackwardRows>(table, stride, first + c, false, rows);
          backward_strip<V, decltype(width)>(x + c, t.pixel, g + c, grad.pixel, dx + c, to.pixel, count,
                                             lanes, rows);
        });
      });
    });
    return;
  }
  const int64_t channel = unit / s.blocks;
  int64_t c = channel, same = channel;
  const Plane<const S>& t = in.of(s, c);
  const Plane<S>& to = out.of(s, same);
  for_chunks(s, unit % s.blocks, s.pixels, [&](int64_t p, int64_t count) {
    for_strips<V>(count, [&](auto width, int64_t i, int64_t vectors, int lanes) {
      constexpr int U = decltype(width)::value;
      V rows[kBackwardRows * U];
      load_rows<V, U, kBackwardRows>(table, stride, channel, true, rows);
      backward_strip<V, decltype(width)>(t.at(s, n, c, p) + i, U * V::width, grad.at(s, n, channel, p) + i,
                                         U * V::width, to.at(s, n, c, p) + i, U * V::width, vectors, lanes,
                                         rows);
    });
  });
}

template <class V, class S>
void backward(const Backward& call, int threads) {
  using T = typename V::Scalar;
  const TensorView* tensors[] = {&call.in.x, &call.in.skip, &call.grad, &call.grad_x, &call.grad_skip};
  const Shape s = shape_of(call.in, tensors, 5);
  if (s.batch * s.channels * s.pixels < kElementsForThreads) threads = 1;
  const Pair<const S> in{plane<const S>(call.in.x), plane<const S>(call.in.skip)};
  const Pair<S> out{plane<S>(call.grad_x), plane<S>(call.grad_skip)};
  const Plane<const S> grad = plane<const S>(call.grad);
  const int64_t wave = images_at_once(s, 2 * sizeof(S), threads), stride = padded<V>(s.channels);
  const int64_t an_image = 2 * s.blocks * s.channels;  // each block's sums of dz, then those of dz times x
  Buffer scratch((wave * an_image + 2 * s.channels) * static_cast<int64_t>(sizeof(double)) +
                 wave * kBackwardRows * stride * static_cast<int64_t>(sizeof(T)));
  double* partial = scratch.take<double>(wave * an_image);
  double* totals = scratch.take<double>(2 * s.channels);
  T* tables = scratch.take<T>(wave * kBackwardRows * stride);
  for (int64_t c = 0; c < 2 * s.channels; ++c) totals[c] = 0;
  for (int64_t first = 0; first < s.batch; first += wave) {
    const int64_t last = least(s.batch, first + wave);
    parallel_for(last - first, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        start_table(s, call, first + i, tables + i * kBackwardRows * stride, stride);
    });
    for_units(s, first, last, threads, false, [&](int64_t n, int64_t unit) {
      const int64_t block = s.channels_innermost ? unit : unit % s.blocks;
      double* sum = partial + (n - first) * an_image + 2 * block * s.channels;
      sums<V>(s, in, grad, n, unit, tables + (n - first) * kBackwardRows * stride, stride, sum,
              sum + s.channels);
    });
    parallel_for(last - first, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* sum = partial + i * an_image;
        finish_sums(s, call, first + i, sum, sum + s.channels, tables + i * kBackwardRows * stride, stride);
      }
    });
    for (int64_t i = 0; i < last - first; ++i)  // in the order of the images
      for (int64_t c = 0; c < 2 * s.channels; ++c) totals[c] += partial[i * an_image + c];
    for_units(s, first, last, threads, true, [&](int64_t n, int64_t unit) {
      write_backward<V>(s, in, grad, out, n, unit, tables + (n - first) * kBackwardRows * stride, stride);
    });
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    if (call.grad_bias.data != nullptr) put_value(totals[c], call.grad_bias, c);
    if (call.grad_weight.data != nullptr) put_value(totals[s.channels + c], call.grad_weight, c);
  }
}

}  // namespace

void group_norm_silu_forward(const Forward& given, int threads) {
  const Forward call{turned(given.in), turned(given.y), given.eps};
  switch (call.in.x.dtype) {
    case DType::f32:
      return forward<VecFloat, float>(call, threads);
    case DType::f64:
      return forward<VecN<double>, double>(call, threads);
    case DType::f16:
      return forward<VecFloat, Half>(call, threads);
    case DType::bf16:
      return forward<VecFloat, BFloat16>(call, threads);
  }
}

void group_norm_silu_backward(const Backward& given, int threads) {
  const Backward call{turned(given.in),        turned(given.grad), turned(given.grad_x),
                      turned(given.grad_skip), given.grad_weight,  given.grad_bias};
  switch (call.in.x.dtype) {
    case DType::f32:
      return backward<VecFloat, float>(call, threads);
    case DType::f64:
      return backward<VecN<double>, double>(call, threads);
    case DType::f16:
      return backward<VecFloat, Half>(call, threads);
    case DType::bf16:
      return backward<VecFloat, BFloat16>(call, threads);
  }
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
