// GroupNorm+SiLU on the CPU. One pass finds the statistics and a second pass writes the result. A few images
// go through both passes at a time, so that the second pass finds their data in the cache.
//
// Either the channels or the pixels are innermost in all tensors of a call. Both layouts share one traversal,
// which divides the work as follows:
//   part    The channels of x or those of skip, in any of the tensors.
//   block   Successive pixels of an image.
//   task    One block, with all channels if channels are innermost and with one channel otherwise. A thread
//           takes whole tasks. Their size depends on the shape alone, so the number of threads does not
//           change the result.
//   chunk   Successive pixels of one image row in a task, with the channels of one part. Sums over
//           a chunk have the type of the arithmetic, and sums over several chunks are float64.
//   strip   Up to four adjacent vectors, repeated at equal distances, that share coefficients. If
//           channels are innermost, each lane has its own channel and the strip repeats at each pixel
//           of the chunk. Otherwise all lanes have the same channel and the strip repeats along the
//           pixels.
//
// This file is compiled once per instruction set. Everything below therefore has internal linkage and uses no
// library templates.
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

constexpr int64_t kPixelsPerChunk = 128;   // where channels are innermost
constexpr int64_t kVectorsPerChunk = 128;  // where pixels are innermost
constexpr int64_t kElementsPerTask = 1 << 15;
constexpr int64_t kInputBytesPerThread = 512 << 10;  // half of a second-level cache
constexpr int64_t kMinElementsForThreads = 1 << 15;  // starting a thread costs more than less work

// What the tensors of one call have in common. Rows of `row_length` pixels are evenly spaced in all of them;
// rows without gaps between them count as one row.
struct Shape {
  int64_t batch, channels, x_channels, pixels, row_length, groups;
  bool channels_innermost;
  int64_t block_pixels, blocks;  // pixels per block, and blocks per image
  int64_t task_channels, tasks;  // channels per task, and tasks per image

  int64_t group_channels() const { return channels / groups; }
  int64_t first_pixel(int64_t block) const { return block * block_pixels; }
  int64_t last_pixel(int64_t block) const { return min_of(pixels, (block + 1) * block_pixels); }
};

struct Task {
  int64_t image, block, first_channel, last_channel;
};

struct Chunk {
  int64_t image, part, part_channel, row, column;  // of the first element
  int64_t channel;                                 // the same channel, counted over both parts
  int64_t channels, pixels;
};

struct Strip {
  int64_t first;        // element of the chunk, in the innermost dimension
  int64_t channel;      // of the first element, counted over both parts
  int64_t step, count;  // pixels from one repetition to the next, and repetitions
  int lanes;            // elements in each
};

// The number of adjacent vectors in a strip, as a type. Only a single vector may have unused lanes (not
// whole).
template <int U, bool W>
struct Width {
  static constexpr int value = U;
  static constexpr bool whole = W;
};

// Elements of a tensor at equal distances.
template <class S>
struct Cursor {
  S* at;
  int64_t step;
  Cursor to(const Strip& strip) const { return {at + strip.first, step * strip.step}; }
};

template <class S>
struct Parts {
  TensorView parts[2];

  Cursor<S> to(const Chunk& chunk) const {
    const TensorView& t = parts[chunk.part];
    return {static_cast<S*>(t.data) + chunk.image * t.stride[0] + chunk.part_channel * t.stride[1] +
                chunk.row * t.stride[2] + chunk.column * t.stride[3],
            t.stride[3]};
  }
  Cursor<S> to(const Chunk& chunk, const Strip& strip) const { return to(chunk).to(strip); }
};

// The parts of a tensor that has all channels.
template <class S>
Parts<S> split(const TensorView& t, const Shape& s) {
  Parts<S> parts{{t, t}};
  parts.parts[1].data = static_cast<char*>(t.data) + s.x_channels * t.stride[1] * element_size(t.dtype);
  return parts;
}

// Turns rows of one pixel each into one row.
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
  s.batch = in.batch(), s.channels = in.channels(), s.x_channels = in.x.size[1];
  s.pixels = in.height() * in.width(), s.row_length = in.width(), s.groups = in.groups;
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
  if (flat) s.row_length = s.pixels;
  s.channels_innermost = by_channel && (!by_pixel || in.width() == 1);
  s.block_pixels =
      s.channels_innermost
          ? max_of(1, min_of(1024, kElementsPerTask / s.channels) / kPixelsPerChunk) * kPixelsPerChunk
          : kElementsPerTask;
  s.blocks = ceil_div(s.pixels, s.block_pixels);
  s.task_channels = s.channels_innermost ? s.channels : 1;
  s.tasks = s.blocks * (s.channels / s.task_channels);
  return s;
}

// ---------------------------------------------------------------------------------------------------------------
// The arithmetic of a strip, the same for both layouts. W: the Width; c: the coefficients.

template <class V, int N>
struct Vectors {
  V v[N];
};

template <class V, int U>
struct TwoSums {
  V first[U], second[U];
};

template <class V, class W, class S>
V load(const S* from, int lanes) {
  return W::whole ? V::load(from) : V::load(from, lanes);
}
template <class W, class V, class S>
void store(V value, S* to, int lanes) {
  W::whole ? value.store(to) : value.store(to, lanes);
}

template <class V, class W, class S>
Vectors<V, W::value> add_strip(Cursor<const S> x, int64_t count, int lanes) {
  Vectors<V, W::value> sum;
  for (V& v : sum.v) v = V::set(0);
  for (int64_t i = 0; i < count; ++i, x.at += x.step)
    for (int u = 0; u < W::value; ++u) sum.v[u] = sum.v[u] + load<V, W>(x.at + u * V::width, lanes);
  return sum;
}

// Sums of x - shift and of its square.
template <class V, class W, class S>
TwoSums<V, W::value> moment_strip(Cursor<const S> x, const Strip& strip, const Vectors<V, W::value> shift) {
  TwoSums<V, W::value> sums;
  for (int u = 0; u < W::value; ++u) sums.first[u] = sums.second[u] = V::set(0);
  for (int64_t i = 0; i < strip.count; ++i, x.at += x.step) {
    for (int u = 0; u < W::value; ++u) {
      const V d = load<V, W>(x.at + u * V::width, strip.lanes) - shift.v[u];
      sums.first[u] = sums.first[u] + d, sums.second[u] = multiply_add(d, d, sums.second[u]);
    }
  }
  return sums;
}

// The coefficients of a channel. The mean is the sum of a number of the arithmetic's type and a remainder
// that goes into another coefficient, so that x - mean keeps its digits at any mean.
enum ForwardCoefficient { kMean, kFactor, kOffset, kForwardCoefficients };
enum BackwardCoefficient {
  kMeanB,
  kRstd,
  kRest,
  kWeight,
  kBias,
  kSlope,
  kConstant,
  kLinear,
  kBackwardCoefficients
};

template <class V, class W, class S>
void forward_strip(Cursor<const S> x, Cursor<S> y, const Strip& strip,
                   const Vectors<V, kForwardCoefficients * W::value> c) {
  constexpr int U = W::value;
  for (int64_t i = 0; i < strip.count; ++i, x.at += x.step, y.at += y.step) {
    V z[U], divisor[U];
    for (int u = 0; u < U; ++u)
      z[u] = multiply_add(load<V, W>(x.at + u * V::width, strip.lanes) - c.v[kMean * U + u],
                          c.v[kFactor * U + u], c.v[kOffset * U + u]);
    one_plus_exp_minus<U>(z, divisor);
    for (int u = 0; u < U; ++u) store<W>(z[u] / divisor[u], y.at + u * V::width, strip.lanes);
  }
}

// The normalised x, and dz, the gradient of the SiLU's input.
template <class V, class W, class S>
void derivative(const S* x, const S* grad, int lanes, const V* c, V* normalised, V* dz) {
  constexpr int U = W::value;
  V z[U], divisor[U];
  for (int u = 0; u < U; ++u) {
    const V d = load<V, W>(x + u * V::width, lanes) - c[kMeanB * U + u];
    normalised[u] = multiply_add(d, c[kRstd * U + u], c[kRest * U + u]);
    z[u] = multiply_add(normalised[u], c[kWeight * U + u], c[kBias * U + u]);
  }
  one_plus_exp_minus<U>(z, divisor);
  for (int u = 0; u < U; ++u) {
    const V s = V::set(1) / divisor[u];
    // s (1 + z (1 - s))
    dz[u] = load<V, W>(grad + u * V::width, lanes) * multiply_add(s, z[u] - z[u] * s, s);
  }
}

// Sums of dz and of dz times the normalised x.
template <class V, class W, class S>
TwoSums<V, W::value> sums_strip(Cursor<const S> x, Cursor<const S> grad, const Strip& strip,
                                const Vectors<V, kSlope * W::value> c) {
  constexpr int U = W::value;
  TwoSums<V, U> sums;
  for (int u = 0; u < U; ++u) sums.first[u] = sums.second[u] = V::set(0);
  for (int64_t i = 0; i < strip.count; ++i, x.at += x.step, grad.at += grad.step) {
    V normalised[U], dz[U];
    derivative<V, W>(x.at, grad.at, strip.lanes, c.v, normalised, dz);
    for (int u = 0; u < U; ++u) {
      sums.first[u] = sums.first[u] + dz[u];
      sums.second[u] = multiply_add(dz[u], normalised[u], sums.second[u]);
    }
  }
  return sums;
}

template <class V, class W, class S>
void backward_strip(Cursor<const S> x, Cursor<const S> grad, Cursor<S> dx, const Strip& strip,
                    const Vectors<V, kBackwardCoefficients * W::value> c) {
  constexpr int U = W::value;
  for (int64_t i = 0; i < strip.count; ++i, x.at += x.step, grad.at += grad.step, dx.at += dx.step) {
    V normalised[U], dz[U];
    derivative<V, W>(x.at, grad.at, strip.lanes, c.v, normalised, dz);
    for (int u = 0; u < U; ++u) {
      const V mean = multiply_add(normalised[u], c.v[kLinear * U + u], c.v[kConstant * U + u]);
      store<W>(multiply_add(dz[u], c.v[kSlope * U + u], mean), dx.at + u * V::width, strip.lanes);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The layouts. Each one defines the most pixels that a chunk has where it is summed and where it is written,
// the strips of a chunk (`use` takes a Width and a Strip), the coefficients of the lanes, and how the sums of
// the lanes become sums of channels. The moments are the one calculation that differs: sums of a lane stay in
// the type of the arithmetic where the lane has its own channel, and become float64 where lanes are added up.
//
// A chunk's values are summed about the mean of its first eighth. The sum of squares is then at most nine
// times the sum about the mean of the chunk, so that little cancels whatever the values are.

int64_t sample_size(int64_t pixels) { return ceil_div(pixels, 8); }

// Means and sums of squared differences of `more` values join those of `count` (Chan, Golub and LeVeque
// 1983). The mean that joins is the sum of two numbers, and the second may be missing.
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

template <class V>
struct ChannelsInnermost {
  using T = typename V::Scalar;
  static constexpr int64_t max_summed = kPixelsPerChunk, max_written = kPixelsPerChunk;

  template <class Use>
  static void for_strips(const Chunk& chunk, const Use& use) {
    int64_t i = 0;
    const auto strip = [&](int lanes) { return Strip{i, chunk.channel + i, 1, chunk.pixels, lanes}; };
    for (; i + 4 * V::width <= chunk.channels; i += 4 * V::width) use(Width<4, true>(), strip(4 * V::width));
    if (i + 2 * V::width <= chunk.channels) use(Width<2, true>(), strip(2 * V::width)), i += 2 * V::width;
    if (i + V::width <= chunk.channels) use(Width<1, true>(), strip(V::width)), i += V::width;
    if (i < chunk.channels) use(Width<1, false>(), strip(static_cast<int>(chunk.channels - i)));
  }

  static V coefficient(const T* channels, int u) { return V::load(channels + u * V::width); }

  template <int U>
  static void add(const TwoSums<V, U>& sums, const Strip& strip, double* first, double* second) {
    T lanes[2][U * V::width];
    for (int u = 0; u < U; ++u)
      sums.first[u].store(lanes[0] + u * V::width), sums.second[u].store(lanes[1] + u * V::width);
    for (int i = 0; i < strip.lanes; ++i) {
      first[i] += static_cast<double>(lanes[0][i]);
      second[i] += static_cast<double>(lanes[1][i]);
    }
  }

  // Joins a chunk to each channel's mean and sum of squared differences, which are those of `count` values.
  template <class S>
  static void add_moments(const Chunk& chunk, Cursor<const S> from, double count, double* mean, double* m2) {
    for_strips(chunk, [&](auto width, const Strip& strip) {
      using W = decltype(width);
      constexpr int U = W::value;
      const int64_t sampled = sample_size(strip.count);
      auto shift = add_strip<V, W>(from.to(strip), sampled, strip.lanes);
      for (V& v : shift.v) v = v * V::set(T(1) / static_cast<T>(sampled));
      const auto sums = moment_strip<V, W>(from.to(strip), strip, shift);
      const V share = V::set(T(1) / static_cast<T>(strip.count));
      T start[U * V::width], rest[U * V::width], chunk_m2[U * V::width];
      for (int u = 0; u < U; ++u) {
        const V m = sums.first[u] * share;
        shift.v[u].store(start + u * V::width), m.store(rest + u * V::width);
        (sums.second[u] - sums.first[u] * m).store(chunk_m2 + u * V::width);
      }
      merge(count, mean + strip.channel, m2 + strip.channel, static_cast<double>(strip.count), start, rest,
            chunk_m2, strip.lanes);
    });
  }
};

template <class V>
struct PixelsInnermost {
  using T = typename V::Scalar;
  static constexpr int64_t max_summed = kVectorsPerChunk * V::width, max_written = kElementsPerTask;

  template <class Use>
  static void for_strips(const Chunk& chunk, const Use& use) {
    for_strips(chunk.channel, chunk.pixels, use);
  }
  template <class Use>
  static void for_strips(int64_t channel, int64_t pixels, const Use& use) {
    const int64_t wide = pixels / (4 * V::width), left = pixels - wide * 4 * V::width,
                  narrow = left / V::width;
    const int rest = static_cast<int>(left - narrow * V::width);
    if (wide > 0) use(Width<4, true>(), Strip{0, channel, 4 * V::width, wide, 4 * V::width});
    if (narrow > 0) use(Width<1, true>(), Strip{pixels - left, channel, V::width, narrow, V::width});
    if (rest > 0) use(Width<1, false>(), Strip{pixels - rest, channel, V::width, 1, rest});
  }

  static V coefficient(const T* channel, int) { return V::set(*channel); }

  // Unused lanes must be zero.
  template <int U>
  static void add(const TwoSums<V, U>& sums, const Strip&, double* first, double* second) {
    for (int u = 0; u < U; ++u)
      *first += sum_of_lanes(sums.first[u]), *second += sum_of_lanes(sums.second[u]);
  }

  template <class S>
  static void add_moments(const Chunk& chunk, Cursor<const S> from, double count, double* mean, double* m2) {
    double shift = 0, sum = 0, square = 0;
    const int64_t sampled = sample_size(chunk.pixels), whole = chunk.pixels / V::width * V::width;
    for_strips(chunk.channel, sampled, [&](auto width, const Strip& strip) {
      const auto sums = add_strip<V, decltype(width)>(from.to(strip), strip.count, strip.lanes);
      for (const V& v : sums.v) shift += sum_of_lanes(v);
    });
    const T k = static_cast<T>(shift / static_cast<double>(sampled));
    // Only whole vectors, because an unused lane would add 0 - shift.
    for_strips(chunk.channel, whole, [&](auto width, const Strip& strip) {
      using W = decltype(width);
      Vectors<V, W::value> shifts;
      for (V& v : shifts.v) v = V::set(k);
      add(moment_strip<V, W>(from.to(strip), strip, shifts), strip, &sum, &square);
    });
    for (int64_t i = whole; i < chunk.pixels; ++i) {
      const double d = static_cast<double>(to_float(from.at[i])) - static_cast<double>(k);
      sum += d, square += d * d;
    }
    const double many = static_cast<double>(chunk.pixels), start = static_cast<double>(k), rest = sum / many,
                 chunk_m2 = square - sum * rest;
    merge(count, mean + chunk.channel, m2 + chunk.channel, many, &start, &rest, &chunk_m2, 1);
  }
};

// ---------------------------------------------------------------------------------------------------------------
// The traversal.

// Calls use(chunk, pixels of the block before it) for the chunks of a task. Everything that this calls is
// inlined, so that coefficients and sums stay in registers.
template <class Use>
__attribute__((flatten)) void for_chunks(const Shape& s, const Task& task, int64_t max_pixels,
                                         const Use& use) {
  const int64_t bounds[] = {0, s.x_channels, s.channels};
  const int64_t begin = s.first_pixel(task.block), end = s.last_pixel(task.block);
  for (int64_t p = begin, pixels; p < end; p += pixels) {
    const int64_t row = p / s.row_length, column = p - row * s.row_length;
    pixels = min_of(min_of(max_pixels, s.row_length - column), end - p);
    for (int64_t part = 0; part < 2; ++part) {
      const int64_t first = max_of(task.first_channel, bounds[part]);
      const int64_t channels = min_of(task.last_channel, bounds[part + 1]) - first;
      if (channels > 0)
        use(Chunk{task.image, part, first - bounds[part], row, column, first, channels, pixels}, p - begin);
    }
  }
}

// Calls use(width, chunk, strip) for the strips of a task.
template <class Layout, class Use>
void for_strips(const Shape& s, const Task& task, int64_t max_pixels, const Use& use) {
  for_chunks(s, task, max_pixels, [&](const Chunk& chunk, int64_t) {
    Layout::for_strips(chunk, [&](auto width, const Strip& strip) { use(width, chunk, strip); });
  });
}

// The coefficients of an image's channels.
template <class T>
struct Coefficients {
  T* first;
  int64_t stride;

  T* at(int which, int64_t channel) const { return first + which * stride + channel; }

  // The first N of them, for a strip.
  template <class Layout, class W, int N, class V>
  Vectors<V, N * W::value> load(const Strip& strip) const {
    Vectors<V, N * W::value> c;
    for (int i = 0; i < N; ++i)
      for (int u = 0; u < W::value; ++u) c.v[i * W::value + u] = Layout::coefficient(at(i, strip.channel), u);
    return c;
  }
};

// Takes the images of a call through the passes, as many together as the cache holds.
template <class V>
class Passes {
 public:
  using T = typename V::Scalar;

  Passes(const Shape& s, int coefficients, int64_t input_bytes_per_element, int threads)
      : s_(s),
        threads_(s.batch * s.channels * s.pixels < kMinElementsForThreads ? 1 : threads),
        images_(max_of(1, min_of(s.batch, threads_ * kInputBytesPerThread /
                                              (input_bytes_per_element * s.channels * s.pixels)))),
        // a whole vector is read at the last channel
        stride_(ceil_div(s.channels, V::width) * V::width + V::width),
        coefficients_(coefficients),
        buffer_(images_ * (2 * s.blocks * s.channels * static_cast<int64_t>(sizeof(double)) +
                           coefficients * stride_ * static_cast<int64_t>(sizeof(T)))),
        first_sum_(buffer_.take<double>(images_ * 2 * s.blocks * s.channels)),
        first_coefficient_(buffer_.take<T>(images_ * coefficients * stride_)) {}

  // Calls pass(first image, last image) for images that go through all passes together.
  template <class Pass>
  void run(const Pass& pass) const {
    for (int64_t first = 0; first < s_.batch; first += images_)
      pass(first, min_of(s_.batch, first + images_));
  }

  // Two sums per channel and block of the i-th of these images. Each block has all first sums, then all
  // second.
  double* sums(int64_t i) const { return first_sum_ + i * 2 * s_.blocks * s_.channels; }
  Coefficients<T> coefficients(int64_t i) const {
    return {first_coefficient_ + i * coefficients_ * stride_, stride_};
  }

  // Calls use(image, sums, coefficients) for each image.
  template <class Use>
  void for_images(int64_t first, int64_t last, const Use& use) const {
    parallel_for(last - first, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) use(first + i, sums(i), coefficients(i));
    });
  }

  // Calls use(task, the block's sums, coefficients) for each task, on the same thread in each pass. The
  // second pass goes backwards, because the data that the first one read last may still be in the cache.
  template <class Use>
  void for_tasks(int64_t first, int64_t last, bool backwards, const Use& use) const {
    parallel_for((last - first) * s_.tasks, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t t = backwards ? begin + end - 1 - k : k, i = t / s_.tasks, in_image = t - i * s_.tasks;
        const int64_t column = in_image / s_.blocks, block = in_image - column * s_.blocks;
        const int64_t channel = column * s_.task_channels;
        use(Task{first + i, block, channel, channel + s_.task_channels}, sums(i) + 2 * block * s_.channels,
            coefficients(i));
      }
    });
  }

 private:
  const Shape& s_;
  const int threads_;
  const int64_t images_, stride_, coefficients_;
  Buffer buffer_;
  double* const first_sum_;
  T* const first_coefficient_;
};

void put_value(double v, const TensorView& t, int64_t channel) {
  store_row(t.dtype, &v, static_cast<char*>(t.data) + channel * t.stride[1] * element_size(t.dtype), 1, 1, 1);
}

// ---------------------------------------------------------------------------------------------------------------
// Forward.

// The statistics of an image's groups, from the mean and the sum of squared differences of each channel in
// each block; and the coefficients of its channels.
template <class T>
void finish_moments(const Shape& s, const Forward& call, int64_t n, double* mean,
                    Coefficients<T> coefficients) {
  double* m2 = mean + s.channels;
  for (int64_t b = 1; b < s.blocks; ++b) {
    const double *more = mean + 2 * b * s.channels, *missing = nullptr;
    merge(static_cast<double>(s.first_pixel(b)), mean, m2,
          static_cast<double>(s.last_pixel(b) - s.first_pixel(b)), more, missing, more + s.channels,
          s.channels);
  }
  const int64_t each = s.group_channels();
  const double pixels = static_cast<double>(s.pixels);
  for (int64_t c = 0; c < s.channels; ++c) mean[c] += value(call.in.offset, c, 0);
  for (int64_t g = 0; g < s.groups; ++g) {
    double group_mean = 0, group_m2 = 0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) group_mean += mean[c];
    group_mean /= static_cast<double>(each);
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      const double delta = mean[c] - group_mean;
      group_m2 += m2[c] + pixels * delta * delta;
    }
    const double variance = group_m2 / (pixels * static_cast<double>(each));
    // a sum of squares slightly below zero counts as zero; a NaN remains
    const double rstd = 1 / ::sqrt((variance < 0 ? 0 : variance) + call.eps);
    double* stats = call.in.stats + 2 * (n * s.groups + g);
    stats[0] = group_mean, stats[1] = rstd;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      // What is added to the input is subtracted from its mean.
      const double exact = group_mean - value(call.in.offset, c, 0);
      const T high = static_cast<T>(exact);
      const double low = exact - static_cast<double>(high);
      const double factor = rstd * value(call.in.weight, c, 1);
      *coefficients.at(kMean, c) = high;
      *coefficients.at(kFactor, c) = static_cast<T>(factor);
      *coefficients.at(kOffset, c) = static_cast<T>(value(call.in.bias, c, 0) - low * factor);
    }
  }
}

template <class V, class S, class Layout>
void forward(const Forward& call, const Shape& s, int threads) {
  const Parts<const S> in{{call.in.x, call.in.skip}};
  const Parts<S> out = split<S>(call.y, s);
  const Passes<V> passes(s, kForwardCoefficients, sizeof(S), threads);
  passes.run([&](int64_t first, int64_t last) {
    passes.for_tasks(first, last, false, [&](const Task& task, double* mean, auto) {
      double* m2 = mean + s.channels;
      for (int64_t c = task.first_channel; c < task.last_channel; ++c) mean[c] = m2[c] = 0;
      for_chunks(s, task, Layout::max_summed, [&](const Chunk& chunk, int64_t before) {
        Layout::add_moments(chunk, in.to(chunk), static_cast<double>(before), mean, m2);
      });
    });
    passes.for_images(first, last, [&](int64_t n, double* mean, auto coefficients) {
      finish_moments(s, call, n, mean, coefficients);
    });
    if (call.y.data == nullptr) return;
    passes.for_tasks(first, last, true, [&](const Task& task, double*, auto coefficients) {
      for_strips<Layout>(
          s, task, Layout::max_written, [&](auto width, const Chunk& chunk, const Strip& strip) {
            using W = decltype(width);
            forward_strip<V, W>(in.to(chunk, strip), out.to(chunk, strip), strip,
                                coefficients.template load<Layout, W, kForwardCoefficients, V>(strip));
          });
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Backward.

// The coefficients that the statistics determine; finish_sums() adds the others.
template <class T>
void start_coefficients(const Shape& s, const Backward& call, int64_t n, Coefficients<T> coefficients) {
  for (int64_t c = 0; c < s.channels; ++c) {
    const double* stats = call.in.stats + 2 * (n * s.groups + c / s.group_channels());
    const T high = static_cast<T>(stats[0]);
    const double low = stats[0] - static_cast<double>(high), weight = value(call.in.weight, c, 1);
    *coefficients.at(kMeanB, c) = high;
    *coefficients.at(kRstd, c) = static_cast<T>(stats[1]);
    *coefficients.at(kRest, c) = static_cast<T>(-low * stats[1]);
    *coefficients.at(kWeight, c) = static_cast<T>(weight);
    *coefficients.at(kBias, c) = static_cast<T>(value(call.in.bias, c, 0));
    *coefficients.at(kSlope, c) = static_cast<T>(stats[1] * weight);
  }
}

// An image's sums of dz, and of dz times the normalised x, from those of its blocks, into those of the first
// block; and the coefficients that follow from them.
template <class T>
void finish_sums(const Shape& s, const Backward& call, int64_t n, double* sum, Coefficients<T> coefficients) {
  const double* product = sum + s.channels;
  for (int64_t b = 1; b < s.blocks; ++b)
    for (int64_t i = 0; i < 2 * s.channels; ++i) sum[i] += sum[2 * b * s.channels + i];
  const int64_t each = s.group_channels();
  const double many = static_cast<double>(s.pixels * each);
  for (int64_t g = 0; g < s.groups; ++g) {
    double constant = 0, linear = 0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      const double weight = value(call.in.weight, c, 1);
      constant += weight * sum[c], linear += weight * product[c];
    }
    const double rstd = call.in.stats[2 * (n * s.groups + g) + 1];
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      *coefficients.at(kConstant, c) = static_cast<T>(-rstd * constant / many);
      *coefficients.at(kLinear, c) = static_cast<T>(-rstd * linear / many);
    }
  }
}

template <class V, class S, class Layout>
void backward(const Backward& call, const Shape& s, int threads) {
  const Parts<const S> in{{call.in.x, call.in.skip}}, grad = split<const S>(call.grad, s);
  const Parts<S> out{{call.grad_x, call.grad_skip}};
  const Passes<V> passes(s, kBackwardCoefficients, 2 * sizeof(S), threads);
  Buffer over_images(2 * s.channels * static_cast<int64_t>(sizeof(double)));
  double* totals = over_images.take<double>(2 * s.channels);
  for (int64_t i = 0; i < 2 * s.channels; ++i) totals[i] = 0;
  passes.run([&](int64_t first, int64_t last) {
    passes.for_images(first, last, [&](int64_t n, double*, auto coefficients) {
      start_coefficients(s, call, n, coefficients);
    });
    passes.for_tasks(first, last, false, [&](const Task& task, double* sum, auto coefficients) {
      double* product = sum + s.channels;
      for (int64_t c = task.first_channel; c < task.last_channel; ++c) sum[c] = product[c] = 0;
      for_strips<Layout>(
          s, task, Layout::max_summed, [&](auto width, const Chunk& chunk, const Strip& strip) {
            using W = decltype(width);
            const auto sums = sums_strip<V, W>(in.to(chunk, strip), grad.to(chunk, strip), strip,
                                               coefficients.template load<Layout, W, kSlope, V>(strip));
            Layout::add(sums, strip, sum + strip.channel, product + strip.channel);
          });
    });
    passes.for_images(first, last, [&](int64_t n, double* sum, auto coefficients) {
      finish_sums(s, call, n, sum, coefficients);
    });
    for (int64_t i = 0; i < last - first; ++i)  // one after the other, whatever the threads
      for (int64_t c = 0; c < 2 * s.channels; ++c) totals[c] += passes.sums(i)[c];
    passes.for_tasks(first, last, true, [&](const Task& task, double*, auto coefficients) {
      for_strips<Layout>(
          s, task, Layout::max_written, [&](auto width, const Chunk& chunk, const Strip& strip) {
            using W = decltype(width);
            backward_strip<V, W>(in.to(chunk, strip), grad.to(chunk, strip), out.to(chunk, strip), strip,
                                 coefficients.template load<Layout, W, kBackwardCoefficients, V>(strip));
          });
    });
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    if (call.grad_bias.data != nullptr) put_value(totals[c], call.grad_bias, c);
    if (call.grad_weight.data != nullptr) put_value(totals[s.channels + c], call.grad_weight, c);
  }
}

template <class V, class S>
void run(const Forward& call, int threads) {
  const TensorView* const tensors[] = {&call.in.x, &call.in.skip, &call.y};
  const Shape s = shape_of(call.in, tensors, 3);
  s.channels_innermost ? forward<V, S, ChannelsInnermost<V>>(call, s, threads)
                       : forward<V, S, PixelsInnermost<V>>(call, s, threads);
}

template <class V, class S>
void run(const Backward& call, int threads) {
  const TensorView* const tensors[] = {&call.in.x, &call.in.skip, &call.grad, &call.grad_x, &call.grad_skip};
  const Shape s = shape_of(call.in, tensors, 5);
  s.channels_innermost ? backward<V, S, ChannelsInnermost<V>>(call, s, threads)
                       : backward<V, S, PixelsInnermost<V>>(call, s, threads);
}

template <class Call>
void dispatch(const Call& call, int threads) {
  switch (call.in.x.dtype) {
    case DType::f32:
      return run<VecF, float>(call, threads);
    case DType::f64:
      return run<VecN<double>, double>(call, threads);
    case DType::f16:
      return run<VecF, Half>(call, threads);
    case DType::bf16:
      return run<VecF, BFloat16>(call, threads);
  }
}

}  // namespace

void group_norm_silu_forward(const Forward& call, int threads) {
  dispatch(Forward{turned(call.in), turned(call.y), call.eps}, threads);
}

void group_norm_silu_backward(const Backward& call, int threads) {
  dispatch(Backward{turned(call.in), turned(call.grad), turned(call.grad_x), turned(call.grad_skip),
                    call.grad_weight, call.grad_bias},
           threads);
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
