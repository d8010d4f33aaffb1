// The gradient of a 3x3 convolution with respect to its weight, by the adjoint of F(2x2, 3x3) (cpu.cpp). With
// d a tile's 4x4 inputs and e the gradient of its 2x2 outputs, the gradient of the kernel g is
//   G^T [sum over the tiles of (A e A^T) * (B^T d B)] G
// for each pair of channels, which takes 16 products per tile instead of 36. The two factors are rounded to
// bfloat16; the sums are float.
//
// Tiles are transformed in chunks, and within a chunk in pairs, because the dot product takes two values at
// once. Each thread then computes sums for some points of the transformed kernel and panels of input
// channels. It adds up all tiles in their order, so any number of threads gives the same bits.
//
// This file is compiled once per instruction set, so everything below has internal linkage and uses no
// library templates.
#include <cstring>
#include <stdexcept>

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "conv3x3.h"
#include "rows.h"
#include "taps.h"

namespace litevae {
namespace LITEVAE_ISA {
using conv3x3::kLanes;
using conv3x3::kPoints;
using conv3x3::WeightGradient;

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kLine = 2 * kLanes;  // bfloat16: a pair of tiles for each channel of a vector
constexpr int64_t kDepth = 128;        // pairs of tiles whose panel of inputs fits in the first-level cache

struct Plan {
  int64_t pairs;                            // pairs of tiles per row of tiles
  Rows x, grad;                             // rows of pixels
  int64_t inputs, outputs;                  // channels
  int64_t panels, vectors;                  // panels of input channels, and vectors per panel
  int64_t tile_rows, all_rows;              // rows of tiles of an image, and of all images
  int64_t rows, depth;                      // rows of tiles per chunk, and pairs of tiles per chunk
  int64_t point_x, point_grad, point_sums;  // distance between the values of two points

  explicit Plan(const WeightGradient& call)
      : pairs(ceil_div(call.x.size[3], 4)),
        x(call.x, call.x.size[1], 2 * pairs),
        grad(call.grad, call.grad.size[1], 2 * pairs) {
    inputs = call.x.size[1], outputs = call.grad.size[1];
    panels = conv3x3::panels(inputs), vectors = conv3x3::panel_vectors(inputs);
    tile_rows = ceil_div(call.x.size[2], 2), all_rows = call.x.size[0] * tile_rows;
    // A chunk is about as large as the sums, or as the third-level cache.
    const int64_t wanted = max_of(kDepth, min_of(8 * kDepth, (int64_t{1} << 18) / (x.padded + grad.padded)));
    rows = max_of(1, min_of(all_rows, wanted / pairs)), depth = rows * pairs;
    // The distance is an odd number of cache lines, so that the points do not compete for the same sets.
    point_x = (panels * vectors * depth + 1) * kLine, point_grad = (grad.padded / kLanes * depth + 1) * kLine;
    point_sums = panels * vectors * kLanes * grad.padded;
  }
};

// Computes B^T d B of a row of tiles from four rows of pixels.
void transform_inputs(const Plan& p, const BFloat16* const* d, int64_t row, BFloat16* to) {
  for (int64_t c = 0; c < p.panels * p.vectors * kLanes; c += kLanes) {
    const int64_t panel = c / kLanes / p.vectors, vector = c / kLanes % p.vectors;
    BFloat16* first = to + ((panel * p.depth + row * p.pairs) * p.vectors + vector) * kLine;
    for (int i = 0; i < 4; ++i) {
      const BFloat16 *a = d[i == 0 ? 0 : i == 3 ? 1 : i] + c, *b = d[i == 0 ? 2 : i == 3 ? 3 : 3 - i] + c;
      const auto column = [&](int64_t at) {
        if (c >= p.x.padded) return VecF::set(0);
        const VecF u = VecF::load(a + at * p.x.padded), v = VecF::load(b + at * p.x.padded);
        return i == 1 ? u + v : u - v;
      };
      BFloat16* point = first + 4 * i * p.point_x;
      VecF v0 = column(0), v1 = column(1);
      for (int64_t t = 0; t < p.pairs; ++t, point += p.vectors * kLine) {
        const VecF v2 = column(4 * t + 2), v3 = column(4 * t + 3);
        const VecF v4 = column(4 * t + 4), v5 = column(4 * t + 5);
        store_pair(v0 - v2, v2 - v4, point);
        store_pair(v1 + v2, v3 + v4, point + p.point_x);
        store_pair(v2 - v1, v4 - v3, point + 2 * p.point_x);
        store_pair(v1 - v3, v3 - v5, point + 3 * p.point_x);
        v0 = v4, v1 = v5;
      }
    }
  }
}

// Computes A e A^T of a row of tiles from two rows of pixels.
void transform_gradients(const Plan& p, const BFloat16* const* e, int64_t row, BFloat16* to) {
  const VecF zero = VecF::set(0);
  for (int64_t c = 0; c < p.grad.padded; c += kLanes) {
    BFloat16* first = to + (c / kLanes * p.depth + row * p.pairs) * kLine;
    for (int i = 0; i < 4; ++i) {
      const auto column = [&](int64_t at) {
        const VecF u = VecF::load(e[0] + at * p.grad.padded + c),
                   v = VecF::load(e[1] + at * p.grad.padded + c);
        return i == 0 ? u : i == 1 ? u + v : i == 2 ? u - v : zero - v;
      };
      BFloat16* point = first + 4 * i * p.point_grad;
      for (int64_t t = 0; t < p.pairs; ++t, point += kLine) {
        const VecF v0 = column(4 * t + 1), v1 = column(4 * t + 2), v2 = column(4 * t + 3),
                   v3 = column(4 * t + 4);
        store_pair(v0, v2, point);
        store_pair(v0 + v1, v2 + v3, point + p.point_grad);
        store_pair(v0 - v1, v2 - v3, point + 2 * p.point_grad);
        store_pair(zero - v1, zero - v3, point + 3 * p.point_grad);
      }
    }
  }
}

// Adds a chunk's products of one point with one panel to the sums, or for the first chunk writes them. It
// processes T output channels at once, with V vectors of input channels.
template <int V, int T>
void multiply(const Plan& p, int64_t pairs, const BFloat16* x, const BFloat16* grad, bool add, float* sums) {
  for (int64_t start = 0; start < pairs; start += kDepth) {
    const int64_t depth = min_of(kDepth, pairs - start);
    for (int64_t o = 0; o < p.grad.padded; o += T) {
      float* place = sums + o * V * kLanes;
      __m512 sum[T][V];
      for (int i = 0; i < T; ++i)
        for (int v = 0; v < V; ++v)
          sum[i][v] = add || start > 0 ? _mm512_loadu_ps(place + (i * V + v) * kLanes) : _mm512_setzero_ps();
      const BFloat16 *d = x + start * V * kLine, *e = grad + (o / kLanes * p.depth + start) * kLine;
      e += o % kLanes * 2;
      for (int64_t t = 0; t < depth; ++t, d += V * kLine, e += kLine) {
        __m512bh factor[V];
        for (int v = 0; v < V; ++v) factor[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(d + v * kLine));
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          int pair;
          std::memcpy(&pair, e + 2 * i, 4);
          const __m512bh g = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
          for (int v = 0; v < V; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], g, factor[v]);
        }
      }
      for (int i = 0; i < T; ++i)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(place + (i * V + v) * kLanes, sum[i][v]);
    }
  }
}

// Multiplies G^T by a column of points.
void transform_sums(const VecF* m, int step, VecF* to, int to_step) {
  const VecF half = VecF::set(0.5f), sum = half * (m[step] + m[2 * step]);
  to[0] = m[0] + sum, to[to_step] = half * (m[step] - m[2 * step]), to[2 * to_step] = sum + m[3 * step];
}

// Computes the taps of one output channel, (9, panels of input channels).
void finish(const Plan& p, const float* sums, int64_t o, float* taps) {
  const int64_t width = p.vectors * kLanes;
  for (int64_t c = 0; c < p.panels * width; c += kLanes) {
    VecF m[kPoints], half[12], tap[9];
    for (int64_t i = 0; i < kPoints; ++i)
      m[i] = VecF::load(sums + i * p.point_sums + (c / width * p.grad.padded + o) * width + c % width);
    for (int j = 0; j < 4; ++j) transform_sums(m + j, 4, half + j, 4);
    for (int i = 0; i < 3; ++i) transform_sums(half + 4 * i, 1, tap + 3 * i, 1);
    for (int k = 0; k < 9; ++k) tap[k].store(taps + k * p.panels * width + c);
  }
}

template <int V, int T>
void weight_gradient(const WeightGradient& call, int threads) {
  const Plan p(call);
  const Image x(call.x), grad(call.grad);
  const int64_t width = p.panels * V * kLanes, per_thread = 4 * p.x.elements + 2 * p.grad.elements;
  Buffer scratch((kPoints * (p.point_x + p.point_grad) + threads * per_thread) * 2 +
                 (kPoints * p.point_sums + threads * 9 * width) * 4);
  BFloat16* inputs = scratch.take<BFloat16>(kPoints * p.point_x);
  BFloat16* gradients = scratch.take<BFloat16>(kPoints * p.point_grad);
  float* sums = scratch.take<float>(kPoints * p.point_sums);
  float* buffers = scratch.take<float>(threads * 9 * width);
  BFloat16* pixels = scratch.take<BFloat16>(threads * per_thread);
  clear(pixels, threads * per_thread);

  for (int64_t begin = 0; begin < p.all_rows; begin += p.rows) {
    const int64_t rows = min_of(p.rows, p.all_rows - begin);
    parallel_for(threads, threads, [&](int64_t from, int64_t to) {
      for (int64_t thread = from; thread < to; ++thread)
        for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r) {
          const int64_t n = (begin + r) / p.tile_rows, y = 2 * ((begin + r) % p.tile_rows);
          BFloat16 *d[4], *e[2];
          for (int i = 0; i < 4; ++i) d[i] = pixels + thread * per_thread + i * p.x.elements;
          for (int i = 0; i < 2; ++i) e[i] = d[0] + 4 * p.x.elements + i * p.grad.elements;
          for (int i = 0; i < 4; ++i) fill_row(p.x, x, n, y - 1 + i, d[i]);
          for (int i = 0; i < 2; ++i) fill_row(p.grad, grad, n, y + i, e[i]);
          transform_inputs(p, d, r, inputs);
          transform_gradients(p, e, r, gradients);
        }
    });
    parallel_for(kPoints * p.panels, threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t point = i / p.panels, panel = i % p.panels;
        multiply<V, T>(p, rows * p.pairs, inputs + point * p.point_x + panel * p.depth * V * kLine,
                       gradients + point * p.point_grad, begin > 0,
                       sums + point * p.point_sums + panel * p.grad.padded * V * kLanes);
      }
    });
  }

  store_weight(call.weight, width, buffers, threads,
               [&](int64_t o, float* taps) { finish(p, sums, o, taps); });
}

}  // namespace

void conv3x3_weight_gradient(const WeightGradient& call, int threads) {
  switch (conv3x3::panel_vectors(call.x.size[1])) {  // at most 24 of 32 registers hold sums
    case 2:
      return weight_gradient<2, 8>(call, threads);
    case 3:
      return weight_gradient<3, 8>(call, threads);
    default:
      return weight_gradient<4, 4>(call, threads);
  }
}
#else
void conv3x3_weight_gradient(const WeightGradient&, int) {
  throw std::logic_error("conv3x3 needs AVX512-BF16");
}
#endif

}  // namespace LITEVAE_ISA
}  // namespace litevae
