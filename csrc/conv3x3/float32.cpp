// 3x3 convolution in float32 on any CPU, by Winograd's F(4x4, 3x3) or F(2x2, 3x3) (winograd.h): a tile of 4x4
// outputs takes 36 products per pair of channels instead of 144, and a tile of 2x2 outputs 16 instead of 36.
// Tensors are stored as float32, float16 or bfloat16, with adjacent channels or with adjacent pixels of a
// row; values are converted when a tile is read and when it is written, and everything between is float32.
//
// A block of tiles is transformed, multiplied and transformed back within the second-level cache, one panel
// of output channels after the other:
//   inputs    (points, vectors of channels, tiles, width)
//   weights   (panels, points, channels, vectors per panel, width)
//   products  (points, tiles, vectors per panel, width), of one panel
// For each vector of channels, rows of pixels pass once through the conversion, the transposition and the
// activation into a buffer in the first-level cache, which has the border of zeros.
//
// An output depends on its tile alone and every sum has the same order, so the number of threads, the block
// and the other images of a batch do not change any bit. A NaN or an infinity reaches all outputs of the
// tiles that contain it, even those that are not its neighbours.
//
// Accuracy, relative to float64, in norm and with normal inputs: 1.0e-6 for F(4x4, 3x3) and 3.6e-7 for F(2x2,
// 3x3) from 128 channels on, and less for fewer; a direct convolution has 2.2e-7. The largest error of an
// output is nine times that. Bound: with |M| the absolute values of a matrix, an error is at most 2^-24 (c +
// 30) times
//   |A^T| [(|G| |g| |G^T|) * (|B^T| |d| |B|)] |A|
// summed over the channels, where c = min(channels, 128) + channels / 128 is the length of a chain of sums.
//
// This file is compiled once per instruction set, so everything below has internal linkage and uses no
// library templates.
#include <cstring>
#include <stdexcept>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "conv3x3.h"
#include "norm.h"
#include "winograd.h"

namespace litevae {
namespace LITEVAE_ISA {
using conv3x3::Forward;

namespace {

constexpr int64_t W = VecF::width;

// The widest panel, and the number of tiles that are multiplied at once with V vectors of weights, so that
// the sums, the weights and the inputs fit in the registers. On x86, inputs need one register at a time,
// because they are broadcast from memory as they are needed; compilers for Arm load all of them first.
#if defined(__AVX512F__)
constexpr int kWidest = 4;
constexpr int tiles_at_once(int vectors) {
  return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
}
#elif defined(__aarch64__)
constexpr int kWidest = 4;
constexpr int tiles_at_once(int vectors) {
  return vectors == 1 ? 14 : vectors == 2 ? 9 : vectors == 3 ? 6 : 5;
}
#else
constexpr int kWidest = 2;
constexpr int tiles_at_once(int vectors) { return vectors == 1 ? 12 : 6; }
#endif

// A tensor of S with adjacent channels or adjacent pixels.
template <class S>
struct Image {
  S* data;
  int64_t channels, width;
  int64_t n, channel, row, pixel;  // strides
  bool channels_adjacent;
  bool streamed;  // Stores bypass the caches; each vector of channels is a whole cache line.

  explicit Image(const TensorView& t)
      : data(static_cast<S*>(t.data)),
        channels(t.size[1]),
        width(t.size[3]),
        n(t.stride[0]),
        channel(t.stride[1]),
        row(t.stride[2]),
        pixel(t.stride[3]),
        channels_adjacent(channels == 1 || channel == 1),
        streamed(channels_adjacent && whole_lines(t)) {
    if (data == nullptr) return;
    const bool pixels_adjacent = width == 1 || pixel == 1;
    if (t.dtype != dtype_of<S>() || (!channels_adjacent && !pixels_adjacent))
      throw std::invalid_argument(
          "a 3x3 convolution's tensors must have one dtype and adjacent channels or pixels");
    if (channels < W && pixels_adjacent && width >= W) channels_adjacent = false;  // fewer unused lanes
  }
  // Reading the lines of y before they are overwritten costs up to a sixth of the time, more than the next
  // operator gains from finding them in a cache.
  static constexpr int64_t kLeastStreamed = 1 << 20;  // bytes
  static bool whole_lines(const TensorView& t) {
    const int64_t line = 64 / sizeof(S);
    return t.size[0] * t.size[1] * t.size[2] * t.size[3] * 4 >= kLeastStreamed && W * sizeof(S) == 64 &&
           reinterpret_cast<uintptr_t>(t.data) % 64 == 0 && t.stride[0] % line == 0 &&
           t.stride[2] % line == 0 && t.stride[3] % line == 0;
  }
  S* at(int64_t image, int64_t c, int64_t y, int64_t x) const {
    return data + image * n + c * channel + y * row + x * pixel;
  }
};

// How the work is divided: into tasks, each of which is a panel of output channels of a block of tiles. A
// block has `images` rectangles of tiles, of the same place in adjacent images. It has several images only if
// all of their tiles would fit.
struct Plan {
  int64_t batch, inputs, outputs, height, width;
  int64_t points, vectors, panels;  // vectors and panels of output channels
  int64_t tile_rows, tile_columns;  // per image
  int64_t images, rows, columns;    // per block
  int64_t image_blocks, row_blocks, column_blocks;
  bool shared;                           // whether all panels' weights are transformed first, for all threads
  int64_t line;                          // vectors in a row of pixels with its border
  int64_t point_inputs, point_products;  // distance between the values of two points of a block

  Plan(const Forward& call, int64_t tile, int threads) {
    batch = call.x.size[0], inputs = call.inputs(), outputs = call.y.size[1];
    height = call.x.size[2], width = call.x.size[3];
    points = (tile + 2) * (tile + 2);
    vectors = ceil_div(outputs, W), panels = ceil_div(vectors, kWidest);
    tile_rows = ceil_div(height, tile), tile_columns = ceil_div(width, tile);
    const int64_t padded = ceil_div(inputs, W) * W, per_image = tile_rows * tile_columns;
    // If the transformed weights exceed the caches, each task transforms its own, and processes enough tiles
    // to make that worthwhile. Otherwise they are transformed once, and a block fits in the second-level
    // cache.
    shared = 4 * weights(vectors) <= kSharedBytes;
    const int64_t bytes = points * 4 * (padded + (shared ? kWidest * W : 0));
    int64_t tiles = (shared ? kBlockBytes : kLargeBlockBytes) / bytes;
    tiles = shared ? max_of(32, min_of(64, tiles)) : max_of(64, min_of(128, tiles));
    tiles = max_of(1, min_of(tiles, ceil_div(batch * per_image * (shared ? 1 : panels), threads)));
    images = max_of(1, min_of(batch, tiles / per_image));
    columns = ceil_div(tile_columns, ceil_div(tile_columns, min_of(tiles, kMostColumns)));
    rows = ceil_div(tile_rows, ceil_div(tile_rows, max_of(1, tiles / columns)));
    row_blocks = ceil_div(tile_rows, rows), column_blocks = ceil_div(tile_columns, columns);
    image_blocks = ceil_div(batch, images);
    line = tile * columns + 2;
    // The distance is an odd number of cache lines, so that the points do not compete for the same sets.
    point_inputs = odd_lines(padded * block_tiles());
    point_products = odd_lines(block_tiles() * kWidest * W);
  }
  int64_t tasks() const { return image_blocks * row_blocks * column_blocks * panels; }
  int64_t block_tiles() const { return images * rows * columns; }
  int64_t first_vector(int64_t panel) const { return vectors * panel / panels; }
  // The number of transformed weights of so many vectors of output channels.
  int64_t weights(int64_t count) const { return points * inputs * count * W; }

 private:
  static constexpr int64_t kSharedBytes = 4 << 20, kBlockBytes = 640 << 10, kLargeBlockBytes = 5 << 20;
  static constexpr int64_t kMostColumns = 8;
  static int64_t odd_lines(int64_t floats) { return ceil_div(floats, 16) / 2 * 32 + 16; }
};

// ---------------------------------------------------------------------------------------------------------------
// Rows of pixels. Each has one vector of channels per pixel.

void clear(float* to, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) VecF::set(0).store(to + i * W);
}

// A vector of channels is convolved as SiLU((x - mean) factor + offset).
struct Activation {
  VecF mean, factor, offset;
};

void activate(const Activation a, float* values, int64_t vectors) {
  constexpr int kAtOnce = 4;
  for (int64_t i = 0; i < vectors; i += kAtOnce) {
    const int64_t rest = vectors - i;
    VecF z[kAtOnce], divisor[kAtOnce];
    for (int u = 0; u < kAtOnce; ++u) {
      const VecF x = u < rest ? VecF::load(values + (i + u) * W) : VecF::set(0);
      z[u] = multiply_add(x - a.mean, a.factor, a.offset);
    }
    one_plus_exp_minus<kAtOnce>(z, divisor);
    for (int u = 0; u < kAtOnce; ++u)
      if (u < rest) (z[u] / divisor[u]).store(values + (i + u) * W);
  }
}

// Reads `count` pixels of the channels from c on; channels that do not exist become zero.
template <class S>
void gather(const Image<S>& x, int64_t n, int64_t c, int64_t y, int64_t column, int64_t count, float* to) {
  const int lanes = static_cast<int>(min_of(W, x.channels - c));
  const S* from = x.at(n, c, y, column);
  if (x.channels_adjacent) {
    if (lanes == W)
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(from + i * x.pixel + W, 0, 2);  // the next vector of channels
        VecF::load(from + i * x.pixel).store(to + i * W);
      }
    else
      for (int64_t i = 0; i < count; ++i) VecF::load(from + i * x.pixel, lanes).store(to + i * W);
    return;
  }
  for (int64_t i = 0; i < count; i += W) {
    const int pixels = static_cast<int>(min_of(W, count - i));
    VecF v[W];
    for (int k = 0; k < W; ++k) {
      const S* row = from + k * x.channel + i;
      v[k] = k >= lanes ? VecF::set(0) : pixels == W ? VecF::load(row) : VecF::load(row, pixels);
    }
    transpose(v);
    for (int k = 0; k < pixels; ++k) v[k].store(to + (i + k) * W);
  }
}

// Writes `count` pixels of the channels from c on.
template <class S>
void scatter(const float* from, const Image<S>& y, int64_t n, int64_t c, int64_t row, int64_t column,
             int64_t count) {
  const int lanes = static_cast<int>(min_of(W, y.channels - c));
  S* to = y.at(n, c, row, column);
  if (y.channels_adjacent) {
    for (int64_t i = 0; i < count; ++i) {
      const VecF v = VecF::load(from + i * W);
      lanes == W ? v.store(to + i * y.pixel) : v.store(to + i * y.pixel, lanes);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += W) {
    const int pixels = static_cast<int>(min_of(W, count - i));
    VecF v[W];
    for (int k = 0; k < W; ++k) v[k] = k < pixels ? VecF::load(from + (i + k) * W) : VecF::set(0);
    transpose(v);
    for (int k = 0; k < lanes; ++k)
      pixels == W ? v[k].store(to + k * y.channel + i) : v[k].store(to + k * y.channel + i, pixels);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Products.

// The products of this many channels are added up one after the other, and then the partial sums, which keeps
// the error of many channels small.
constexpr int64_t kChannelsPerSum = 128;

// Computes one point's products of T tiles with a panel of V vectors, and adds them to earlier ones if `add`.
template <int V, int T>
void multiply(const float* in, int64_t channels, int64_t in_step, const float* weight, bool add, float* out) {
  VecF sum[T][V];
#pragma GCC unroll 16
  for (int i = 0; i < T; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = VecF::set(0);
  for (int64_t c = 0; c < channels; c += W, in += in_step) {
    const int64_t lanes = min_of(W, channels - c);
    for (int64_t k = 0; k < lanes; ++k, weight += V * W) {
      VecF w[V];
      for (int v = 0; v < V; ++v) w[v] = VecF::load(weight + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < T; ++i) {
        const VecF d = VecF::set(in[i * W + k]);
        for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(d, w[v], sum[i][v]);
      }
    }
  }
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] + VecF::load(out + (i * V + v) * W);
  }
#pragma GCC unroll 16
  for (int i = 0; i < T; ++i)
    for (int v = 0; v < V; ++v) sum[i][v].store(out + (i * V + v) * W);
}

template <int V, int T>
void multiply_some(int64_t tiles, const float* in, int64_t channels, int64_t in_step, const float* weight,
                   bool add, float* out) {
  if constexpr (T > 1)
    if (tiles < T) return multiply_some<V, T - 1>(tiles, in, channels, in_step, weight, add, out);
  multiply<V, T>(in, channels, in_step, weight, add, out);
}

// Computes one point's products of any number of tiles, in nearly equal steps, with a panel of `vectors`.
template <int V>
void multiply_panel(int64_t vectors, int64_t tiles, const float* in, int64_t channels, const float* weight,
                    float* out) {
  if constexpr (V > 1)
    if (vectors < V) return multiply_panel<V - 1>(vectors, tiles, in, channels, weight, out);
  constexpr int T = tiles_at_once(V);
  const int64_t steps = ceil_div(tiles, T);
  for (int64_t c = 0; c < channels; c += kChannelsPerSum)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t first = tiles * i / steps, count = tiles * (i + 1) / steps - first;
      multiply_some<V, T>(count, in + (c * tiles + first * W), min_of(kChannelsPerSum, channels - c),
                          tiles * W, weight + c * V * W, c > 0, out + first * V * W);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Weights.

// Converts a matrix of `lanes` rows, `step` apart, to `count` vectors of its columns, `to_step` apart. Rows
// that do not exist are zero.
template <class T>
void load_columns(const T* from, int64_t step, int lanes, int64_t count, float* to, int64_t to_step) {
  for (int64_t i = 0; i < count; i += W) {
    const int columns = static_cast<int>(min_of(W, count - i));
    VecF v[W];
    for (int k = 0; k < W; ++k) {
      const T* row = from + k * step + i;
      v[k] = k >= lanes ? VecF::set(0) : columns == W ? VecF::load(row) : VecF::load(row, columns);
    }
    transpose(v);
    for (int k = 0; k < columns; ++k) v[k].store(to + (i + k) * to_step);
  }
}

// The taps of a vector of output channels: (input channels, 9, width).
template <class T>
void load_taps(const TensorView& w, bool transposed, int64_t output, int lanes, int64_t inputs, float* taps) {
  const int64_t o = w.stride[transposed ? 1 : 0], c = w.stride[transposed ? 0 : 1];
  const T* from = static_cast<const T*>(w.data) + output * o;
  const auto place = [&](int64_t k) { return taps + (transposed ? 8 - k : k) * W; };
  const auto tap = [&](int64_t k) { return k / 3 * w.stride[2] + k % 3 * w.stride[3]; };
  if (o == 1) {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t k = 0; k < 9; ++k) {
        const T* at = from + i * c + tap(k);
        (lanes == W ? VecF::load(at) : VecF::load(at, lanes)).store(place(k) + i * 9 * W);
      }
  } else if (c == 1) {
    for (int64_t k = 0; k < 9; ++k) load_columns(from + tap(k), o, lanes, inputs, place(k), 9 * W);
  } else if (w.stride[2] == 3 && w.stride[3] == 1 && c == 9 && !transposed) {
    load_columns(from, o, lanes, 9 * inputs, taps, W);
  } else if (w.stride[2] == 3 && w.stride[3] == 1) {
    for (int64_t i = 0; i < inputs; ++i)
      load_columns(from + i * c, o, lanes, 9, place(0) + i * 9 * W, transposed ? -W : W);
  } else {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t k = 0; k < 9; ++k)
        for (int64_t l = 0; l < W; ++l)
          place(k)[i * 9 * W + l] =
              l < lanes ? static_cast<float>(to_float(from[l * o + i * c + tap(k)])) : 0.0f;
  }
}

// Rounds taps to the type of the tensors before they are transformed. Autocast does the same, so the result
// does not depend on it.
template <class S>
void round_taps(float* taps, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) {
    S stored[W];
    VecF::load(taps + i * W).store(stored);
    VecF::load(stored).store(taps + i * W);
  }
}

// Transforms the weights of a vector of output channels to its place in a panel of `count` vectors.
template <int M, class S>
void pack(const Forward& call, int64_t output, int64_t count, float* to) {
  constexpr int N = M + 2;
  constexpr int64_t kChannels = 32;  // per step, so that the taps stay in the first-level cache
  const int64_t inputs = call.inputs();
  const int lanes = static_cast<int>(min_of(W, call.y.size[1] - output));
  alignas(64) float taps[kChannels * 9 * W];
  for (int64_t c = 0; c < inputs; c += kChannels) {
    const int64_t channels = min_of(kChannels, inputs - c);
    TensorView w = call.weight;
    w.data = static_cast<char*>(w.data) + c * w.stride[call.transposed ? 0 : 1] * element_size(w.dtype);
    switch (w.dtype) {
      case DType::f32:
        load_taps<float>(w, call.transposed, output, lanes, channels, taps);
        break;
      case DType::f16:
        load_taps<Half>(w, call.transposed, output, lanes, channels, taps);
        break;
      case DType::bf16:
        load_taps<BFloat16>(w, call.transposed, output, lanes, channels, taps);
        break;
      case DType::f64:
        break;  // refused by conv3x3_float32_forward
    }
    if (sizeof(S) < sizeof(float) && w.dtype != dtype_of<S>()) round_taps<S>(taps, channels * 9);
    for (int64_t i = 0; i < channels; ++i) {
      VecF half[3][N], points[N];
      for (int k = 0; k < 3; ++k) {
        VecF column[3];
        for (int y = 0; y < 3; ++y) column[y] = VecF::load(taps + (i * 9 + 3 * y + k) * W);
        Winograd<M>::taps(column, half[k]);
      }
      float* place = to + (c + i) * count * W;
      for (int y = 0; y < N; ++y) {
        const VecF row[3] = {half[0][y], half[1][y], half[2][y]};
        Winograd<M>::taps(row, points);
        for (int x = 0; x < N; ++x, place += inputs * count * W) points[x].store(place);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------

// The data that all threads share.
template <class S>
struct Task {
  Image<S> x, skip, residual, y;
  Plan p;
  bool silu;
  const float* norm;     // (N, 3, padded inputs): means, factors and offsets, or null
  const float* bias;     // zeros if there is no bias
  const float* weights;  // of all panels, or null
  const Forward& call;
};

// The memory of one thread.
template <int M>
struct Space {
  static constexpr int N = M + 2;
  float *rows, *half, *inputs, *products, *weights;

  static int64_t floats(const Plan& p) {
    return 2 * N * p.line * W + N * N * (p.point_inputs + p.point_products) +
           (p.shared ? 0 : p.weights(min_of(p.vectors, kWidest)));
  }
  Space(const Plan& p, float* memory)
      : rows(memory),
        half(rows + N * p.line * W),
        inputs(half + N * p.line * W),
        products(inputs + N * N * p.point_inputs),
        weights(products + N * N * p.point_products) {}
};

// A rectangle of an image's tiles: its first pixel, its size in tiles, and its first tile in the block.
struct Patch {
  int64_t n, top, left, rows, columns, tile;
};

// Transforms a vector of channels of a patch.
template <int M, class S>
void transform_inputs(const Task<S>& k, const Patch& b, int64_t c, int64_t tiles, const Space<M>& space) {
  constexpr int N = M + 2;
  const Plan& p = k.p;
  const Image<S>& image = c < k.x.channels ? k.x : k.skip;
  const int64_t channel = c < k.x.channels ? c : c - k.x.channels;
  Activation activation{VecF::set(0), VecF::set(1), VecF::set(0)};
  if (k.norm != nullptr) {
    const int64_t padded = ceil_div(p.inputs, W) * W;
    const float* at = k.norm + b.n * 3 * padded + c;
    activation = {VecF::load(at), VecF::load(at + padded), VecF::load(at + 2 * padded)};
  }
  const int64_t pixels = M * b.columns + 2;
  const int64_t first = max_of(0, b.left - 1), last = min_of(p.width, b.left - 1 + pixels);
  const int64_t step = p.line * W;
  int64_t next = b.top - 1;  // the rows before it are in the buffer, where they take turns
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t y0 = b.top + r * M - 1;
    const float* d[N];
    for (int i = 0; i < N; ++i) d[i] = space.rows + (y0 + i + N) % N * step;
    for (; next < y0 + N; ++next) {
      float* to = space.rows + (next + N) % N * step;
      if (next < 0 || next >= p.height) {
        clear(to, pixels);
        continue;
      }
      const int64_t before = first - (b.left - 1), count = last - first;
      clear(to, before);
      gather(image, b.n, channel, next, first, count, to + before * W);
      if (k.silu) activate(activation, to + before * W, count);
      clear(to + (before + count) * W, pixels - before - count);
    }
    for (int64_t x = 0; x < pixels; ++x) {
      VecF column[N], points[N];
      for (int i = 0; i < N; ++i) column[i] = VecF::load(d[i] + x * W);
      Winograd<M>::inputs(column, points);
      for (int i = 0; i < N; ++i) points[i].store(space.half + i * step + x * W);
    }
    float* to = space.inputs + (c * tiles + (b.tile + r * b.columns) * W);
    for (int i = 0; i < N; ++i, to += N * p.point_inputs) {
      const float* from = space.half + i * step;
      VecF row[N], points[N];
      row[M] = VecF::load(from), row[M + 1] = VecF::load(from + W);
      for (int64_t t = 0; t < b.columns; ++t) {
        row[0] = row[M], row[1] = row[M + 1];
        for (int j = 2; j < N; ++j) row[j] = VecF::load(from + (t * M + j) * W);
        Winograd<M>::inputs(row, points);
        for (int j = 0; j < N; ++j) points[j].store(to + j * p.point_inputs + t * W);
      }
    }
  }
}

// Transforms a tile's products of one vector of channels to outputs.
template <int M>
inline __attribute__((always_inline)) void transform_tile(const float* m, int64_t point, VecF bias,
                                                          VecF (*tile)[M]) {
  constexpr int N = M + 2;
  VecF half[M][N];
  for (int j = 0; j < N; ++j) {
    VecF column[N], outputs[M];
    for (int i = 0; i < N; ++i) column[i] = VecF::load(m + (i * N + j) * point);
    Winograd<M>::outputs(column, outputs);
    for (int i = 0; i < M; ++i) half[i][j] = outputs[i];
  }
  for (int i = 0; i < M; ++i) {
    Winograd<M>::outputs(half[i], tile[i]);
    for (int j = 0; j < M; ++j) tile[i][j] = tile[i][j] + bias;
  }
}

inline void stream(VecF v, float* to) { v.stream(to); }
template <class S>
inline void stream(VecF v, S* to) {
  v.store(to);
}

// Transforms a patch of a panel of `count` vectors, the first of which is `first`, to tensors with adjacent
// channels.
template <int M, class S>
void transform_outputs(const Task<S>& k, const Patch& b, int64_t first, int64_t count,
                       const Space<M>& space) {
  const Image<S> residual = k.residual, y = k.y;  // copies, because for the compiler a store might change k
  const int64_t point = k.p.point_products, channels = k.p.outputs;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t top = b.top + r * M, rows = min_of(M, k.p.height - top);
    for (int64_t t = 0; t < b.columns; ++t) {
      const int64_t left = b.left + t * M, columns = min_of(M, k.p.width - left);
      const float* m = space.products + (b.tile + r * b.columns + t) * count * W;
      for (int64_t v = 0; v < count; ++v) {
        const int64_t c = (first + v) * W;
        const int lanes = static_cast<int>(min_of(W, channels - c));
        VecF tile[M][M];
        transform_tile<M>(m + v * W, point, VecF::load(k.bias + c), tile);
        const S* from = residual.data == nullptr ? nullptr : residual.at(b.n, c, top, left);
        S* to = y.at(b.n, c, top, left);
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < M; ++j) {
            if (i >= rows || j >= columns) continue;
            VecF sum = tile[i][j];
            if (from != nullptr) {
              const S* place = from + i * residual.row + j * residual.pixel;
              sum = sum + (lanes == W ? VecF::load(place) : VecF::load(place, lanes));
            }
            S* place = to + i * y.row + j * y.pixel;
            if (lanes < W)
              sum.store(place, lanes);
            else
              y.streamed ? stream(sum, place) : sum.store(place);
          }
      }
    }
  }
}

// Does the same for tensors of which one has adjacent pixels, row by row.
template <int M, class S>
void transform_output_rows(const Task<S>& k, const Patch& b, int64_t first, int64_t count,
                           const Space<M>& space) {
  const Plan& p = k.p;
  const int64_t step = p.line * W, columns = min_of(M * b.columns, p.width - b.left);
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t top = b.top + r * M, rows = min_of(M, p.height - top);
    for (int64_t v = 0; v < count; ++v) {
      const int64_t c = (first + v) * W;
      const VecF bias = VecF::load(k.bias + c);
      const float* m = space.products + ((b.tile + r * b.columns) * count + v) * W;
      for (int64_t t = 0; t < b.columns; ++t) {
        VecF tile[M][M];
        transform_tile<M>(m + t * count * W, p.point_products, bias, tile);
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < M; ++j) tile[i][j].store(space.rows + i * step + (t * M + j) * W);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* row = space.rows + i * step;
        if (k.residual.data != nullptr) {
          gather(k.residual, b.n, c, top + i, b.left, columns, space.half);
          for (int64_t x = 0; x < columns; ++x)
            (VecF::load(row + x * W) + VecF::load(space.half + x * W)).store(row + x * W);
        }
        scatter(row, k.y, b.n, c, top + i, b.left, columns);
      }
    }
  }
}

// Computes some tasks, in their order.
template <int M, class S>
void convolve(const Task<S>& k, int64_t begin, int64_t end, const Space<M>& space) {
  constexpr int64_t kPoints = (M + 2) * (M + 2);
  const Plan& p = k.p;
  const bool by_channel =
      k.y.channels_adjacent && (k.residual.data == nullptr || k.residual.channels_adjacent);
  int64_t transformed = -1;  // the block whose inputs are transformed
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / p.panels, panel = task % p.panels;
    const int64_t column = block % p.column_blocks, row = block / p.column_blocks % p.row_blocks;
    const int64_t image = block / p.column_blocks / p.row_blocks * p.images;
    const int64_t rows = min_of(p.rows, p.tile_rows - row * p.rows);
    const int64_t columns = min_of(p.columns, p.tile_columns - column * p.columns);
    const int64_t images = min_of(p.images, p.batch - image), tiles = images * rows * columns;
    const auto patch = [&](int64_t i) {
      return Patch{image + i, row * p.rows * M, column * p.columns * M, rows, columns, i * rows * columns};
    };
    if (block != transformed)
      for (int64_t c = 0; c < p.inputs; c += W)
        for (int64_t i = 0; i < images; ++i) transform_inputs<M>(k, patch(i), c, tiles, space);
    transformed = block;

    const int64_t first = p.first_vector(panel), count = p.first_vector(panel + 1) - first;
    const float* weights = p.shared ? k.weights + p.weights(first) : space.weights;
    if (!p.shared)
      for (int64_t v = 0; v < count; ++v) pack<M, S>(k.call, (first + v) * W, count, space.weights + v * W);
    for (int64_t i = 0; i < kPoints; ++i) {
      const float* in = space.inputs + i * p.point_inputs;
      const float* weight = weights + i * p.inputs * count * W;
      float* out = space.products + i * p.point_products;
      multiply_panel<kWidest>(count, tiles, in, p.inputs, weight, out);
    }
    for (int64_t i = 0; i < images; ++i)
      by_channel ? transform_outputs<M>(k, patch(i), first, count, space)
                 : transform_output_rows<M>(k, patch(i), first, count, space);
  }
  stream_fence();
}

template <int M, class S>
void forward(const Forward& call, int threads) {
  const Plan p(call, M, threads);
  const int64_t tasks = p.tasks(), outputs = p.vectors * W;
  threads = static_cast<int>(min_of(threads, tasks));
  const int64_t per_thread = Space<M>::floats(p), shared = p.shared ? p.weights(p.vectors) : 0;
  const int64_t padded = ceil_div(p.inputs, W) * W, coefficients = norm_floats(call, padded);
  Buffer scratch((threads * per_thread + shared + outputs + coefficients) * 4);
  float* weights = scratch.take<float>(shared);
  float* memory = scratch.take<float>(threads * per_thread);
  float* bias = scratch.take<float>(outputs);
  for (int64_t c = 0; c < outputs; ++c) bias[c] = 0;
  if (call.bias.data != nullptr)
    load_row(call.bias.dtype, static_cast<const char*>(call.bias.data), call.bias.stride[1], p.outputs, 1,
             bias);
  float* norm = coefficients == 0 ? nullptr : scratch.take<float>(coefficients);
  fill_norm(call, padded, norm);
  const Task<S> k{Image<S>(call.x),
                  Image<S>(call.norm.skip),
                  Image<S>(call.residual),
                  Image<S>(call.y),
                  p,
                  call.silu,
                  norm,
                  bias,
                  weights,
                  call};
  if (p.shared)
    parallel_for(p.vectors, threads, [&](int64_t begin, int64_t end) {
      for (int64_t panel = 0; panel < p.panels; ++panel) {
        const int64_t first = p.first_vector(panel), last = p.first_vector(panel + 1);
        for (int64_t v = max_of(begin, first); v < min_of(end, last); ++v)
          pack<M, S>(call, v * W, last - first, weights + p.weights(first) + (v - first) * W);
      }
    });
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      convolve<M>(k, tasks * thread / threads, tasks * (thread + 1) / threads,
                  Space<M>(p, memory + thread * per_thread));
  });
}

template <class S>
void forward(const Forward& call, int threads) {
  conv3x3::output_tile(call.y.size[2], call.y.size[3]) == 4 ? forward<4, S>(call, threads)
                                                            : forward<2, S>(call, threads);
}

}  // namespace

void conv3x3_float32_forward(const Forward& call, int threads) {
  if (call.y.size[0] * call.y.size[1] * call.y.size[2] * call.y.size[3] == 0) return;
  if (call.weight.dtype == DType::f64)
    throw std::invalid_argument("a 3x3 convolution's weight must not be float64");
  if (call.norm.skip.data != nullptr && call.x.size[1] % W != 0)
    throw std::invalid_argument("x must have whole vectors of channels before those of a skip");
  switch (call.x.dtype) {
    case DType::f32:
      return forward<float>(call, threads);
    case DType::f16:
      return forward<Half>(call, threads);
    case DType::bf16:
      return forward<BFloat16>(call, threads);
    case DType::f64:
      throw std::invalid_argument("the 3x3 convolution does not serve float64");
  }
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
