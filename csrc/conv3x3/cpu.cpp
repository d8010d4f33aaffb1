// 3x3 convolution on CPUs with AVX512-BF16, by Winograd's F(2x2, 3x3) (Lavin and Gray 2016): a tile of 2x2
// outputs takes 16 products per pair of channels instead of 36. With d the tile's 4x4 inputs and g the
// kernel,
//   y = A^T [(G g G^T) * (B^T d B)] A,   B^T = 1 0 -1 0   G = 1   0   0   A^T = 1 1  1  0
//                                              0 1  1 0       .5  .5  .5        0 1 -1 -1
//                                              0 -1 1 0       .5 -.5  .5
//                                              0 1 0 -1       0   0   1
// and the sums over the input channels are 16 matrix products. Transforms are computed in float. The two
// factors and the result are each rounded to bfloat16 once.
//
// A thread processes rows of tiles one after the other. Each row of pixels passes through the activation once
// and into a ring buffer of rows, which has the border of zeros. A block of tiles is transformed, multiplied
// and transformed back within the second-level cache, while the next rows and the residual are prefetched. An
// output depends on its tile alone, so any number of threads gives the same bits. A NaN or an infinity
// reaches all outputs of the tiles that contain it, even those that are not its neighbours.
//
// This file is compiled once per instruction set, so everything below has internal linkage and uses no
// library templates.
#include <cstring>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "conv3x3.h"
#include "norm.h"
#include "rows.h"

namespace litevae {
namespace LITEVAE_ISA {
using conv3x3::Forward;
using conv3x3::kLanes;
using conv3x3::kPoints;
using conv3x3::kRun;

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kTilesPerBlock = 64;

struct Shape : Rows {
  int64_t batch, inputs, outputs;
  int64_t tile_rows, tile_columns;       // per image
  int64_t rows, columns;                 // rows and columns of tiles per block
  int64_t row_blocks, column_blocks;     // per image
  int64_t ring;                          // rows of pixels in the ring buffer
  int64_t point_inputs, point_products;  // distance between the values of two points of a block

  Shape(const Forward& call, int vectors, int tiles_at_once, int threads)
      : Rows(call.x, call.inputs(), ceil_div(call.x.size[3], 2)) {
    batch = call.x.size[0], inputs = call.inputs(), outputs = call.y.size[1];
    tile_rows = ceil_div(height, 2), tile_columns = ceil_div(width, 2);
    column_blocks = ceil_div(tile_columns, kTilesPerBlock), columns = ceil_div(tile_columns, column_blocks);
    rows = min_of(kTilesPerBlock / columns,
                  max_of(1, batch * tile_rows / (2 * threads)));  // every thread needs work
    rows = min_of(rows, tile_rows), row_blocks = ceil_div(tile_rows, rows);
    ring = 2 * rows + 2;
    // The distance is an odd number of cache lines, so that the points do not compete for the same sets.
    const int64_t tiles = ceil_div(rows * columns, tiles_at_once) * tiles_at_once;
    point_inputs = tiles * padded + kRun, point_products = tiles * vectors * kLanes + kLanes;
  }
};

// ---------------------------------------------------------------------------------------------------------------
// A run of a pixel's channels, as even and odd ones.

struct Run {
  VecF even, odd;

  static Run load(const BFloat16* from) {
    const __m512i bits = _mm512_loadu_si512(from), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(bits, high))}};
  }
  // Stores the even channels before the odd ones, the order in which inputs and weights are multiplied.
  void store(BFloat16* to) const {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v)));
  }
  Run operator+(Run o) const { return {even + o.even, odd + o.odd}; }
  Run operator-(Run o) const { return {even - o.even, odd - o.odd}; }
};

// Computes four points of each tile in a row of tiles. They belong to one row of B^T, which is a sum or a
// difference of two rows of pixels.
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

// Computes one point's products with a panel, for T tiles at once, with V vectors of output channels. It
// multiplies up to T - 1 tiles beyond the last one, whose products are never read.
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

// Transforms a row of tiles of one panel, whose first output channel is `first`. Arguments are passed by
// value, because for the compiler a store might change the object of a reference.
template <int V>
void transform_outputs(const Shape s, const float* products, const float* bias, const Image residual,
                       const Image y, int64_t n, int64_t row, int64_t column, int64_t tiles, int64_t first) {
  const int64_t rows = s.height - row, columns = s.width - column;
  for (int64_t c = first; c < min_of(first + V * kLanes, s.outputs); c += kLanes) {
    const int lanes = static_cast<int>(min_of(kLanes, s.outputs - c));
    const VecF b = VecF::load(bias + c);
    const BFloat16* from = residual.data == nullptr ? nullptr : residual.at(n, row, column) + c;
    BFloat16* to = y.at(n, row, column) + c;
    for (int64_t t = 0; t < tiles; ++t) {
      const float* m = products + t * V * kLanes + c - first;
      VecF h[4][2];  // the products times A
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

VecF halved(VecF v) { return v * VecF::set(0.5f); }
Run halved(Run r) { return {halved(r.even), halved(r.odd)}; }

// Multiplies G by a column of taps.
template <class V>
void transform_weights(V g0, V g1, V g2, V* to, int step) {
  const V outer = g0 + g2;
  to[0] = g0, to[step] = halved(outer + g1), to[2 * step] = halved(outer - g1), to[3 * step] = g2;
}

// Loads taps and rounds them to bfloat16 before they are transformed. Autocast does the same, so the result
// does not depend on it.
template <class T>
VecF load_taps(const T* from, int lanes) {
  const VecF v = VecF::load(from, lanes);
  if (sizeof(T) == sizeof(BFloat16)) return v;
  const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.v)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}

// Transposes a 16x16 matrix of 32-bit values.
void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]),
                  d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // The 4x4 blocks are transposed; now transpose the matrix of blocks.
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_i32x4(a, b, 0x88), r[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), r[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Transforms the taps of a vector of output channels, of which `lanes` exist, and stores them in their
// columns of a panel: pairs of input channels, point by point. Input channels are adjacent in memory.
template <class T>
void pack_outputs(const T* from, int64_t output, int64_t row, int64_t column, int lanes, int64_t inputs,
                  int64_t panel_width, BFloat16* to) {
  const int64_t padded = conv3x3::padded_inputs(inputs);
  __m512i pairs[kPoints][kLanes];
  for (int64_t c = 0; c < padded; c += kRun) {
    const int first = static_cast<int>(min_of(kLanes, inputs - c));
    const int second = static_cast<int>(max_of(0, min_of(kLanes, inputs - c - kLanes)));
    for (int o = 0; o < kLanes; ++o) {
      if (o >= lanes) {
        for (int64_t i = 0; i < kPoints; ++i) pairs[i][o] = _mm512_setzero_si512();
        continue;
      }
      const auto tap = [&](int i, int j) {
        const T* at = from + o * output + i * row + j * column + c;
        Run g;
        deinterleave(load_taps(at, first), load_taps(at + kLanes, second), g.even, g.odd);
        return g;
      };
      Run u[4][3], points[4];
      for (int j = 0; j < 3; ++j) transform_weights(tap(0, j), tap(1, j), tap(2, j), &u[0][j], 3);
      for (int i = 0; i < 4; ++i) {
        transform_weights(u[i][0], u[i][1], u[i][2], points, 1);
        for (int j = 0; j < 4; ++j) points[j].store(reinterpret_cast<BFloat16*>(&pairs[4 * i + j][o]));
      }
    }
    for (int64_t i = 0; i < kPoints; ++i) {
      transpose(pairs[i]);
      for (int64_t k = 0; k < kLanes; ++k)
        _mm512_storeu_si512(to + (i * padded + c + 2 * k) * panel_width, pairs[i][k]);
    }
  }
}

// Does the same if output channels are adjacent in memory.
template <class T>
void pack_adjacent_outputs(const TensorView& w, const T* from, int lanes, int64_t panel_width, BFloat16* to) {
  const int64_t inputs = w.size[1], padded = conv3x3::padded_inputs(inputs);
  const auto points = [&](int64_t c, VecF* to16) {
    VecF u[12];
    for (int j = 0; j < 3; ++j) {
      VecF tap[3];
      for (int i = 0; i < 3; ++i)
        tap[i] = c < inputs ? load_taps(from + c * w.stride[1] + i * w.stride[2] + j * w.stride[3], lanes)
                            : VecF::set(0);
      transform_weights(tap[0], tap[1], tap[2], u + j, 3);
    }
    for (int i = 0; i < 4; ++i) transform_weights(u[3 * i], u[3 * i + 1], u[3 * i + 2], to16 + 4 * i, 1);
  };
  for (int64_t c = 0; c < padded; c += kRun)
    for (int64_t k = 0; k < kRun; k += 2) {
      const int64_t channel = c + (k < kLanes ? 2 * k : 2 * k - kRun + 1);  // the order of a run
      VecF a[kPoints], b[kPoints];
      points(channel, a), points(channel + 2, b);
      for (int64_t i = 0; i < kPoints; ++i) store_pair(a[i], b[i], to + (i * padded + c + k) * panel_width);
    }
}

template <class T>
void pack(const TensorView& w, int threads, BFloat16* packed) {
  const int64_t outputs = w.size[0], inputs = w.size[1], padded = conv3x3::padded_inputs(inputs);
  const int64_t vectors = conv3x3::panel_vectors(outputs), panel_width = vectors * kLanes;
  const bool direct = w.dtype == dtype_of<T>() && (w.stride[0] == 1 || w.stride[1] == 1);
  const int64_t buffered = direct ? 0 : kLanes * 9 * inputs;  // taps of a vector of outputs, as floats
  Buffer scratch(threads * buffered * 4);
  float* buffers = scratch.take<float>(threads * buffered);
  const int64_t count = conv3x3::panels(outputs) * vectors;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t v = count * thread / threads; v < count * (thread + 1) / threads; ++v) {
        const int lanes = static_cast<int>(max_of(0, min_of(kLanes, outputs - v * kLanes)));
        const char* from =
            static_cast<const char*>(w.data) + v * kLanes * w.stride[0] * element_size(w.dtype);
        BFloat16* to = packed + v / vectors * kPoints * padded * panel_width + v % vectors * kLanes * 2;
        if (direct && w.stride[1] == 1)
          pack_outputs(reinterpret_cast<const T*>(from), w.stride[0], w.stride[2], w.stride[3], lanes, inputs,
                       panel_width, to);
        else if (direct)
          pack_adjacent_outputs(w, reinterpret_cast<const T*>(from), lanes, panel_width, to);
        else {
          float* taps = buffers + thread * buffered;
          for (int64_t o = 0; o < lanes; ++o)
            for (int64_t k = 0; k < 9; ++k) {
              const int64_t at = o * w.stride[0] + k / 3 * w.stride[2] + k % 3 * w.stride[3];
              load_row(w.dtype, from + at * element_size(w.dtype), w.stride[1], inputs, 1,
                       taps + (o * 9 + k) * inputs);
            }
          pack_outputs(taps, 9 * inputs, 3 * inputs, inputs, lanes, inputs, panel_width, to);
        }
      }
  });
}

// ---------------------------------------------------------------------------------------------------------------

// The data that all threads share.
struct Task {
  Image x, skip, residual, y;
  Shape s;
  bool silu;
  const float* norm;  // (N, 3, padded inputs): means, factors and offsets, or null
  const float* bias;  // zeros if there is no bias
  const BFloat16* packed;
};

// Fills one row of the ring buffer.
void fill_row(const Task& k, int64_t n, int64_t y, BFloat16* to) {
  const Shape& s = k.s;
  litevae::fill_row(s, y, to, [&](BFloat16* pixels) {
    int64_t first = 0;  // channel
    for (const Image* image : {&k.x, &k.skip}) {
      if (image->data == nullptr) continue;
      const BFloat16* from = image->at(n, y, 0);
      const float* norm = k.norm == nullptr ? nullptr : k.norm + n * 3 * s.padded + first;
      if (k.silu)
        activate_pixels(from, image->pixel, s.width, image->channels, norm, s.padded, pixels + first,
                        s.padded);
      else
        copy_pixels(from, image->pixel, s.width, image->channels, pixels + first, s.padded);
      first += image->channels;
    }
  });
}

// The memory of one thread.
struct Space {
  BFloat16 *ring, *inputs;
  float* products;

  static int64_t bytes(const Shape& s) {
    return (s.ring * s.elements + kPoints * s.point_inputs) * 2 + kPoints * s.point_products * 4;
  }
  Space(const Shape& s, char* memory)
      : ring(reinterpret_cast<BFloat16*>(memory)),
        inputs(ring + s.ring * s.elements),
        products(reinterpret_cast<float*>(inputs + kPoints * s.point_inputs)) {
    clear(ring, s.ring * s.elements);
  }
  BFloat16* row(const Shape& s, int64_t y) const { return ring + (y + s.ring) % s.ring * s.elements; }
};

// A block of tiles of an image, and its first pixel.
struct Block {
  int64_t n, top, left, rows, columns;
};

// Prefetches a part of the data that is needed after the block's products: its residual, and rows of pixels
// from `next` on.
void prefetch(const Task& k, const Block& b, int64_t next, int64_t part, int64_t parts) {
  const int64_t columns = min_of(2 * b.columns, k.s.width - b.left);
  for (int64_t y = b.top; y < min_of(k.s.height, b.top + 2 * b.rows); ++y)
    k.residual.prefetch(b.n, y, b.left, columns, part, parts);
  for (int64_t y = next; y < min_of(k.s.height, next + 2 * k.s.rows); ++y)
    for (const Image* image : {&k.x, &k.skip}) image->prefetch(b.n, y, b.left, columns, part, parts);
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

// Views a weight (I, O, 3, 3) as (O, I, 3, 3), rotated by 180 degrees.
TensorView transposed(const TensorView& w) {
  const int64_t last = 2 * (w.stride[2] + w.stride[3]) * element_size(w.dtype);
  return {static_cast<char*>(w.data) + last,
          w.dtype,
          {w.size[1], w.size[0], 3, 3},
          {w.stride[1], w.stride[0], -w.stride[2], -w.stride[3]}};
}

template <int V, int T>
void forward(const Forward& call, int threads) {
  threads = static_cast<int>(min_of(threads, call.x.size[0] * ceil_div(call.x.size[2], 2)));
  const Shape s(call, V, T, threads);
  const int64_t outputs = conv3x3::panels(s.outputs) * V * kLanes, per_thread = Space::bytes(s);
  const int64_t coefficients = norm_floats(call, s.padded);
  Buffer scratch(threads * per_thread + conv3x3::packed_bytes(s.inputs, s.outputs) +
                 (outputs + coefficients) * 4);
  char* memory = scratch.take<char>(threads * per_thread);
  BFloat16* packed = scratch.take<BFloat16>(conv3x3::packed_bytes(s.inputs, s.outputs) / 2);
  float* bias = scratch.take<float>(outputs);
  const TensorView weight = call.transposed ? transposed(call.weight) : call.weight;
  (weight.dtype == DType::bf16 ? pack<BFloat16> : pack<float>)(weight, threads, packed);
  for (int64_t c = 0; c < outputs; ++c) bias[c] = 0;
  if (call.bias.data != nullptr)
    load_row(call.bias.dtype, static_cast<const char*>(call.bias.data), call.bias.stride[1], s.outputs, 1,
             bias);
  float* norm = coefficients == 0 ? nullptr : scratch.take<float>(coefficients);
  fill_norm(call, s.padded, norm);
  const Task k{
      Image(call.x), Image(call.norm.skip), Image(call.residual), Image(call.y), s, call.silu, norm, bias,
      packed};

  const int64_t blocks = s.batch * s.row_blocks;
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Space space(s, memory + thread * per_thread);
      int64_t image = -1, next = 0;  // the ring buffer holds the rows before `next` of this image
      for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; ++i) {
        Block b{i / s.row_blocks, 2 * (i % s.row_blocks * s.rows), 0, 0, 0};
        b.rows = min_of(s.rows, s.tile_rows - b.top / 2);
        if (b.n != image) image = b.n, next = b.top - 1;
        for (; next <= b.top + 2 * b.rows; ++next) fill_row(k, b.n, next, space.row(s, next));
        for (; b.left < 2 * s.tile_columns; b.left += 2 * s.columns) {
          b.columns = min_of(s.columns, s.tile_columns - b.left / 2);
          convolve<V, T>(k, b, next, space);
        }
      }
    }
  });
}

}  // namespace

void conv3x3_forward(const Forward& call, int threads) {
  if (call.y.size[0] * call.y.size[1] * call.y.size[2] * call.y.size[3] == 0) return;
  switch (conv3x3::panel_vectors(call.y.size[1])) {  // 24 of 32 registers hold sums
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
