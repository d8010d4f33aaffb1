// 3x3 convolution on CPUs with AVX512-BF16, by Winograd's F(2x2, 3x3) (Lavin and Gray 2016): a tile of 2x2
// outputs takes 16 products a pair of channels instead of 36. With d the tile's 4x4 inputs and g the kernel,
//   y = A^T [(G g G^T) * (B^T d B)] A,   B^T = 1 0 -1 0   G = 1   0   0   A^T = 1 1  1  0
//                                              0 1  1 0       .5  .5  .5        0 1 -1 -1
//                                              0 -1 1 0       .5 -.5  .5
//                                              0 1 0 -1       0   0   1
// and the sums over the input channels are 16 matrix products. Transforms are computed in float; the two
// factors are rounded to bfloat16 once, the result once.
//
// A thread takes rows of tiles one after the other. Each row of pixels passes through the activation once,
// into a ring of rows that has the border of zeros; a block of tiles is transformed, multiplied and
// transformed back within the second-level cache, while the next rows and the residual are being prefetched.
// An output depends on its tile alone, so any number of threads gives the same bits. A NaN or an infinity
// spoils all outputs of the tiles that it is in, also those that it is no neighbour of.
//
// Compiled once an instruction set: only internal linkage and no library templates below.
#include <cstring>
#include <stdexcept>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "conv3x3.h"

namespace litevae {
namespace LITEVAE_ISA {
using conv3x3::Forward;
using conv3x3::kLanes;
using conv3x3::kRun;

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kTiles = 64;  // a block
constexpr int kPoints = 16;     // of a transformed tile

// ---------------------------------------------------------------------------------------------------------------
// Rows of pixels.

struct Image {
  BFloat16* data;
  int64_t channels, n, row, pixel;

  explicit Image(const TensorView& t)
      : data(static_cast<BFloat16*>(t.data)),
        channels(t.size[1]),
        n(t.stride[0]),
        row(t.stride[2]),
        pixel(t.stride[3]) {
    if (data != nullptr && (t.dtype != DType::bf16 || (channels > 1 && t.stride[1] != 1)))
      throw std::invalid_argument("a 3x3 convolution's tensors must be bf16 with channels innermost");
  }
  BFloat16* at(int64_t image, int64_t y, int64_t x) const { return data + image * n + y * row + x * pixel; }

  // One of `parts` parts of some pixels of a row.
  void prefetch(int64_t image, int64_t y, int64_t x, int64_t count, int64_t part, int64_t parts) const {
    if (data == nullptr) return;
    const int64_t elements = (count - 1) * pixel + channels;
    const BFloat16* from = at(image, y, x);
    for (int64_t i = elements * part / parts; i < elements * (part + 1) / parts; i += kRun)
      _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
  }
};

struct Shape {
  int64_t batch, height, width, inputs, outputs;
  int64_t padded;                        // input channels
  int64_t tile_rows, tile_columns;       // an image
  int64_t rows, columns;                 // of tiles a block
  int64_t row_blocks, column_blocks;     // an image
  int64_t ring, row_elements;            // rows of pixels, and elements of one
  int64_t point_inputs, point_products;  // from one point's values of a block to the next one's

  Shape(const Forward& call, int vectors, int tiles_at_once, int threads) {
    batch = call.x.size[0], height = call.x.size[2], width = call.x.size[3];
    inputs = call.x.size[1], outputs = call.y.size[1], padded = conv3x3::padded_inputs(inputs);
    tile_rows = ceil_div(height, 2), tile_columns = ceil_div(width, 2);
    column_blocks = ceil_div(tile_columns, kTiles), columns = ceil_div(tile_columns, column_blocks);
    rows = least(kTiles / columns, most(1, batch * tile_rows / (2 * threads)));  // work for every thread
    rows = least(rows, tile_rows), row_blocks = ceil_div(tile_rows, rows);
    ring = 2 * rows + 2, row_elements = (2 * tile_columns + 2) * padded;
    // an odd number of cache lines, so that the points do not compete for the same sets
    const int64_t tiles = ceil_div(rows * columns, tiles_at_once) * tiles_at_once;
    point_inputs = tiles * padded + kRun, point_products = tiles * vectors * kLanes + kLanes;
  }
};

void copy_pixels(const BFloat16* from, int64_t step, int64_t count, int64_t channels, BFloat16* to,
                 int64_t to_step) {
  const int64_t whole = channels / kRun * kRun;
  const __mmask32 rest = static_cast<__mmask32>((1u << (channels - whole)) - 1);
  for (int64_t i = 0; i < count; ++i, from += step, to += to_step) {
    for (int64_t c = 0; c < whole; c += kRun) _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
    if (rest != 0) _mm512_mask_storeu_epi16(to + whole, rest, _mm512_maskz_loadu_epi16(rest, from + whole));
  }
}

void clear(BFloat16* to, int64_t count) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * 2);
}

// `count`, a multiple of two vectors.
void silu(BFloat16* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    VecF z[2] = {VecF::load(values + i), VecF::load(values + i + kLanes)}, divisor[2];
    one_plus_exp_minus<2>(z, divisor);
    for (int u = 0; u < 2; ++u) (z[u] / divisor[u]).store(values + i + u * kLanes);
  }
}

// One row of pixels with a zero before it and zeros behind. Padding channels stay zero.
void fill_row(const Shape& s, const Image& x, bool activated, int64_t n, int64_t y, BFloat16* to) {
  if (y < 0 || y >= s.height) return clear(to, s.row_elements);
  clear(to, s.padded);
  to += s.padded;
  copy_pixels(x.at(n, y, 0), x.pixel, s.width, x.channels, to, s.padded);
  if (activated) silu(to, s.width * s.padded);
  clear(to + s.width * s.padded, s.row_elements - (s.width + 1) * s.padded);
}

// ---------------------------------------------------------------------------------------------------------------
// A run of a pixel's channels: the even and the odd ones.

struct Run {
  VecF even, odd;

  static Run load(const BFloat16* from) {
    const __m512i bits = _mm512_loadu_si512(from), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(bits, high))}};
  }
  // The even channels and then the odd ones: inputs and weights are multiplied in that order.
  void store(BFloat16* to) const {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v)));
  }
  Run operator+(Run o) const { return {even + o.even, odd + o.odd}; }
  Run operator-(Run o) const { return {even - o.even, odd - o.odd}; }
  Run halved() const { return {even * VecF::set(0.5f), odd * VecF::set(0.5f)}; }
};

// Four points of each tile in a row of them: those of one row of B^T, which is a sum or a difference of two
// rows of pixels.
template <bool Sum>
void transform_inputs(const BFloat16* p, const BFloat16* q, const Shape& s, int64_t tiles, BFloat16* to) {
  const auto column = [&](int64_t at) {
    const Run a = Run::load(p + at), b = Run::load(q + at);
    return Sum ? a + b : a - b;
  };
  for (int64_t c = 0; c < s.padded; c += kRun) {
    Run d0 = column(c), d1 = column(c + s.padded);
    for (int64_t t = 0; t < tiles; ++t) {
      const Run d2 = column(c + (2 * t + 2) * s.padded), d3 = column(c + (2 * t + 3) * s.padded);
      BFloat16* point = to + t * s.padded + c;
      (d0 - d2).store(point);
      (d1 + d2).store(point + s.point_inputs);
      (d2 - d1).store(point + 2 * s.point_inputs);
      (d1 - d3).store(point + 3 * s.point_inputs);
      d0 = d2, d1 = d3;
    }
  }
}

// One point's products of a panel: T tiles at once, with V vectors of output channels. Multiplies up to T - 1
// tiles beyond the last one, whose values nobody reads.
template <int V, int T>
void multiply(const BFloat16* in, int64_t channels, int64_t tiles, const BFloat16* weight, float* out) {
  for (int64_t t = 0; t < tiles; t += T, in += T * channels) {
    __m512 sum[T][V];
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = _mm512_setzero_ps();
    const BFloat16* w = weight;
    for (int64_t c = 0; c < channels; c += 2, w += 2 * V * kLanes) {
      __m512bh factor[V];
      for (int v = 0; v < V; ++v)
        factor[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 2 * kLanes * v));
#pragma GCC unroll 16
      for (int i = 0; i < T; ++i) {
        int pair;
        std::memcpy(&pair, in + i * channels + c, 4);
        const __m512bh d = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int v = 0; v < V; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], d, factor[v]);
      }
    }
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < V; ++v, out += kLanes) _mm512_storeu_ps(out, sum[i][v]);
  }
}

// A row of tiles of one panel, whose first output channel is `first`. By value, because a store might change
// what a reference refers to.
template <int V>
void transform_outputs(const Shape s, const float* products, const float* bias, const Image residual,
                       const Image y, int64_t n, int64_t row, int64_t column, int64_t tiles, int64_t first) {
  const int64_t rows = s.height - row, columns = s.width - column;
  for (int64_t c = first; c < least(first + V * kLanes, s.outputs); c += kLanes) {
    const int lanes = static_cast<int>(least(kLanes, s.outputs - c));
    const VecF b = VecF::load(bias + c);
    const BFloat16* from = residual.data == nullptr ? nullptr : residual.at(n, row, column) + c;
    BFloat16* to = y.at(n, row, column) + c;
    for (int64_t t = 0; t < tiles; ++t) {
      const float* m = products + t * V * kLanes + c - first;
      VecF h[4][2];  // times A from the right
      for (int i = 0; i < 4; ++i, m += 4 * s.point_products) {
        const VecF m1 = VecF::load(m + s.point_products), m2 = VecF::load(m + 2 * s.point_products);
        h[i][0] = VecF::load(m) + (m1 + m2);
        h[i][1] = (m1 - m2) - VecF::load(m + 3 * s.point_products);
      }
      for (int x = 0; x < 2; ++x) {
        if (2 * t + x == columns) break;
        const VecF middle = h[1][x] + b;
        const VecF tile[2] = {(h[0][x] + h[2][x]) + middle, (middle - h[2][x]) - h[3][x]};
        for (int i = 0; i < 2; ++i) {
          if (i == rows) break;
          VecF sum = tile[i];
          if (from != nullptr) {
            const BFloat16* r = from + (2 * t + x) * residual.pixel + i * residual.row;
            sum = sum + (lanes == kLanes ? VecF::load(r) : VecF::load(r, lanes));
          }
          BFloat16* place = to + (2 * t + x) * y.pixel + i * y.row;
          lanes == kLanes ? sum.store(place) : sum.store(place, lanes);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------

// A column of taps times G.
void transform_weights(Run g0, Run g1, Run g2, Run* to, int step) {
  const Run outer = g0 + g2;
  to[0] = g0, to[step] = (outer + g1).halved(), to[2 * step] = (outer - g1).halved(), to[3 * step] = g2;
}

// One output channel's taps (9, padded) to its column of a panel: pairs of channels, point by point.
void pack_output(const float* taps, int64_t padded, int64_t panel_width, BFloat16* to) {
  for (int64_t c = 0; c < padded; c += kRun) {
    const auto tap = [&](int row, int column) {
      const float* from = taps + (3 * row + column) * padded + c;
      Run g;
      deinterleave(VecF::load(from), VecF::load(from + kLanes), g.even, g.odd);
      return g;
    };
    Run u[4][3];
    for (int j = 0; j < 3; ++j) transform_weights(tap(0, j), tap(1, j), tap(2, j), &u[0][j], 3);
    for (int i = 0; i < 4; ++i) {
      Run points[4];
      transform_weights(u[i][0], u[i][1], u[i][2], points, 1);
      for (int j = 0; j < 4; ++j) {
        BFloat16 pairs[kRun];
        points[j].store(pairs);
        BFloat16* column = to + ((4 * i + j) * padded + c) * panel_width;
        for (int k = 0; k < kRun; k += 2) std::memcpy(column + k * panel_width, pairs + k, 4);
      }
    }
  }
}

void pack(const TensorView& w, int threads, BFloat16* packed) {
  const int64_t outputs = w.size[0], inputs = w.size[1], padded = conv3x3::padded_inputs(inputs);
  const int64_t panel_width = conv3x3::panel_vectors(outputs) * kLanes, element = element_size(w.dtype);
  const int64_t count = conv3x3::panels(outputs) * panel_width;
  Buffer scratch(threads * 9 * padded * 4);
  float* spaces = scratch.take<float>(threads * 9 * padded);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* taps = spaces + i * 9 * padded;
      std::memset(taps, 0, static_cast<size_t>(9 * padded) * sizeof(float));
      for (int64_t o = count * i / threads; o < count * (i + 1) / threads; ++o) {
        const char* from = static_cast<const char*>(w.data) + o * w.stride[0] * element;
        for (int64_t k = 0; k < 9; ++k)
          if (o < outputs)
            load_row(w.dtype, from + (k / 3 * w.stride[2] + k % 3 * w.stride[3]) * element, w.stride[1],
                     inputs, 1, taps + k * padded);
          else
            std::memset(taps + k * padded, 0, static_cast<size_t>(padded) * sizeof(float));
        BFloat16* panel = packed + o / panel_width * kPoints * padded * panel_width;
        pack_output(taps, padded, panel_width, panel + o % panel_width * 2);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------

// What all threads share.
struct Task {
  Image x, residual, y;
  Shape s;
  bool silu;
  const float* bias;  // zeros where there is none
  const BFloat16* packed;
};

// What a thread has for itself.
struct Space {
  BFloat16 *ring, *inputs;
  float* products;

  static int64_t bytes(const Shape& s) {
    return (s.ring * s.row_elements + kPoints * s.point_inputs) * 2 + kPoints * s.point_products * 4;
  }
  Space(const Shape& s, char* memory)
      : ring(reinterpret_cast<BFloat16*>(memory)),
        inputs(ring + s.ring * s.row_elements),
        products(reinterpret_cast<float*>(inputs + kPoints * s.point_inputs)) {
    clear(ring, s.ring * s.row_elements);
  }
  BFloat16* row(const Shape& s, int64_t y) const { return ring + (y + s.ring) % s.ring * s.row_elements; }
};

// Rows and columns of tiles of an image, and their first pixel.
struct Block {
  int64_t n, top, left, rows, columns;
};

// A part of what follows the block's products: its residual, and rows of pixels from `next` on.
void prefetch(const Task& k, const Block& b, int64_t next, int64_t part, int64_t parts) {
  const int64_t columns = least(2 * b.columns, k.s.width - b.left);
  for (int64_t y = b.top; y < least(k.s.height, b.top + 2 * b.rows); ++y)
    k.residual.prefetch(b.n, y, b.left, columns, part, parts);
  for (int64_t y = next; y < least(k.s.height, next + 2 * k.s.rows); ++y)
    k.x.prefetch(b.n, y, b.left, columns, part, parts);
}

template <int V, int T>
void convolve(const Task& k, const Block& b, int64_t next, const Space& space) {
  const Shape& s = k.s;
  for (int64_t r = 0; r < b.rows; ++r) {
    const BFloat16* d[4];
    for (int i = 0; i < 4; ++i) d[i] = space.row(s, b.top + 2 * r - 1 + i) + b.left * s.padded;
    BFloat16* to = space.inputs + r * b.columns * s.padded;
    transform_inputs<false>(d[0], d[2], s, b.columns, to);
    transform_inputs<true>(d[1], d[2], s, b.columns, to + 4 * s.point_inputs);
    transform_inputs<false>(d[2], d[1], s, b.columns, to + 8 * s.point_inputs);
    transform_inputs<false>(d[1], d[3], s, b.columns, to + 12 * s.point_inputs);
  }
  const int64_t panels = conv3x3::panels(s.outputs), factors = s.padded * V * kLanes;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t i = 0; i < kPoints; ++i) {
      const int64_t step = p * kPoints + i;
      prefetch(k, b, next, step, panels * kPoints);
      multiply<V, T>(space.inputs + i * s.point_inputs, s.padded, b.rows * b.columns,
                     k.packed + step * factors, space.products + i * s.point_products);
    }
    for (int64_t r = 0; r < b.rows; ++r)
      transform_outputs<V>(s, space.products + r * b.columns * V * kLanes, k.bias, k.residual, k.y, b.n,
                           b.top + 2 * r, b.left, b.columns, p * V * kLanes);
  }
}

template <int V, int T>
void forward(const Forward& call, int threads) {
  threads = static_cast<int>(least(threads, call.x.size[0] * ceil_div(call.x.size[2], 2)));
  const Shape s(call, V, T, threads);
  const int64_t outputs = conv3x3::panels(s.outputs) * V * kLanes, a_thread = Space::bytes(s);
  Buffer scratch(threads * a_thread + conv3x3::packed_bytes(s.inputs, s.outputs) + outputs * 4);
  char* memory = scratch.take<char>(threads * a_thread);
  BFloat16* packed = scratch.take<BFloat16>(conv3x3::packed_bytes(s.inputs, s.outputs) / 2);
  float* bias = scratch.take<float>(outputs);
  pack(call.weight, threads, packed);
  for (int64_t c = 0; c < outputs; ++c) bias[c] = 0;
  if (call.bias.data != nullptr)
    load_row(call.bias.dtype, static_cast<const char*>(call.bias.data), call.bias.stride[1], s.outputs, 1,
             bias);
  const Task k{Image(call.x), Image(call.residual), Image(call.y), s, call.silu, bias, packed};

  const int64_t blocks = s.batch * s.row_blocks;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Space space(s, memory + thread * a_thread);
      int64_t image = -1, next = 0;  // the rows before `next` of this image are in the ring
      for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; ++i) {
        Block b{i / s.row_blocks, 2 * (i % s.row_blocks * s.rows), 0, 0, 0};
        b.rows = least(s.rows, s.tile_rows - b.top / 2);
        if (b.n != image) image = b.n, next = b.top - 1;
        for (; next <= b.top + 2 * b.rows; ++next) fill_row(s, k.x, k.silu, b.n, next, space.row(s, next));
        for (; b.left < 2 * s.tile_columns; b.left += 2 * s.columns) {
          b.columns = least(s.columns, s.tile_columns - b.left / 2);
          convolve<V, T>(k, b, next, space);
        }
      }
    }
  });
}

}  // namespace

void conv3x3_forward(const Forward& call, int threads) {
  if (call.y.size[0] * call.y.size[1] * call.y.size[2] * call.y.size[3] == 0) return;
  switch (conv3x3::panel_vectors(call.y.size[1])) {  // of 32 registers, 24 hold sums
    case 2:
      return forward<2, 12>(call, threads);
    case 3:
      return forward<3, 8>(call, threads);
    default:
      return forward<4, 6>(call, threads);
  }
}

#else
void conv3x3_forward(const Forward&, int) { throw std::logic_error("conv3x3 needs AVX512-BF16"); }
#endif

}  // namespace LITEVAE_ISA
}  // namespace litevae
