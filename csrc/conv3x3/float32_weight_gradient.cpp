// The gradient of a 3x3 convolution with respect to its weight in float32, by the adjoint of F(4x4, 3x3)
// (winograd.h). With d a tile's 6x6 inputs and e the gradient of its 4x4 outputs, the gradient of the kernel
// is
//   G^T [sum over the tiles of (A e A^T) * (B^T d B)] G
// for each pair of channels, which takes 36 products per tile instead of 144.
//
// Tiles are transformed in chunks. Each thread then computes sums for some points of the transformed kernel
// and panels of input channels. It adds up kDepth tiles, and then these sums, in the order of the tiles, so
// any number of threads gives the same bits, and the error grows with the number of sums instead of the
// number of tiles.
//
// This file is compiled once per instruction set, so everything below has internal linkage and uses no
// library templates.
#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vector.h"
#include "conv3x3.h"
#include "taps.h"
#include "winograd.h"

namespace litevae {
namespace LITEVAE_ISA {
using conv3x3::WeightGradient;

namespace {

using Transforms = Winograd<4>;
constexpr int kOutputs = 4, kInputs = 6, kPoints = kInputs * kInputs;  // of a tile
constexpr int kLanes = VecF::width;
constexpr int64_t kDepth = 128;               // tiles whose panel of inputs fits in the first-level cache
constexpr int64_t kTilesPerSegment = 32;      // at most
constexpr int64_t kChunk = int64_t{1} << 17;  // floats per point of both factors in a chunk

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kWidestPanel = 4;  // vectors of input channels
#else
constexpr int64_t kWidestPanel = 3;
#endif

// Returns the number of vectors per panel that pads least, and of those numbers the largest.
int64_t panel_vectors(int64_t vectors) {
  if (vectors == 1) return 1;
  int64_t best = kWidestPanel;
  for (int64_t width = kWidestPanel - 1; width >= 2; --width)
    if (ceil_div(vectors, width) * width < ceil_div(vectors, best) * best) best = width;
  return best;
}

struct Plan {
  int64_t inputs, outputs, height, width;
  int64_t tile_rows, row_segments, tiles;  // rows of tiles per image, segments per row, tiles per segment
  int64_t segments, chunk, depth;          // segments of all images, and segments and tiles per chunk
  int64_t panels, vectors,
      grad_vectors;  // panels of input channels, vectors per panel, and of output channels
  int64_t point_x, point_grad, point_sums;  // distance between the values of two points

  Plan(const WeightGradient& call, int64_t vectors_per_panel) : vectors(vectors_per_panel) {
    inputs = call.x.size[1], outputs = call.grad.size[1], height = call.x.size[2], width = call.x.size[3];
    const int64_t columns = ceil_div(width, kOutputs);
    tile_rows = ceil_div(height, kOutputs), row_segments = ceil_div(columns, kTilesPerSegment);
    tiles = ceil_div(columns, row_segments), segments = call.x.size[0] * tile_rows * row_segments;
    panels = ceil_div(inputs, vectors * kLanes), grad_vectors = ceil_div(outputs, kLanes);
    const int64_t channels = (panels * vectors + grad_vectors) * kLanes;
    const int64_t wanted = max_of(kDepth, min_of(8 * kDepth, kChunk / channels));
    chunk = max_of(1, min_of(segments, wanted / tiles)), depth = chunk * tiles;
    // The extra cache line keeps most points from competing for the same sets.
    point_x = panels * vectors * depth * kLanes + 16, point_grad = grad_vectors * depth * kLanes + 16;
    point_sums = panels * vectors * kLanes * grad_vectors * kLanes;
  }
  int64_t pixels() const { return kOutputs * tiles + 2; }
};

// A rectangle of pixels of one vector of channels: (rows, columns, lanes), with zeros outside the image.
struct Rectangle {
  int64_t n, top, left, rows, columns, channel;
};

template <class T>
void fill_adjacent(const T* from, int64_t pixel, int64_t count, int lanes, float* to) {
  for (int64_t i = 0; i < count; ++i, from += pixel, to += kLanes)
    (lanes == kLanes ? VecF::load(from) : VecF::load(from, lanes)).store(to);
}

// Loads `lanes` rows of pixels, one per channel, and transposes them.
void fill_strided(const TensorView& t, const char* from, int64_t count, int lanes, float* to) {
  const int64_t channel = t.stride[1] * element_size(t.dtype), pixel = t.stride[3] * element_size(t.dtype);
  for (int64_t x = 0; x < count; x += kLanes) {
    const int pixels = static_cast<int>(min_of(int64_t{kLanes}, count - x));
    VecF square[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      float values[kLanes] = {};
      if (k < lanes) load_row(t.dtype, from + k * channel + x * pixel, t.stride[3], pixels, 1, values);
      square[k] = VecF::load(values);
    }
    transpose(square);
    for (int k = 0; k < pixels; ++k) square[k].store(to + (x + k) * kLanes);
  }
}

void fill(const TensorView& t, const Rectangle& r, float* to) {
  const int lanes = static_cast<int>(min_of(int64_t{kLanes}, t.size[1] - r.channel));
  const int64_t first = max_of(0, -r.left), last = max_of(first, min_of(r.columns, t.size[3] - r.left));
  for (int64_t i = 0; i < r.rows; ++i, to += r.columns * kLanes) {
    const int64_t y = r.top + i;
    const bool inside = y >= 0 && y < t.size[2] && lanes > 0;
    const int64_t begin = inside ? first : r.columns, end = inside ? last : r.columns;
    for (int64_t x = 0; x < begin * kLanes; ++x) to[x] = 0;
    for (int64_t x = end * kLanes; x < r.columns * kLanes; ++x) to[x] = 0;
    if (begin == end) continue;
    const int64_t at =
        r.n * t.stride[0] + r.channel * t.stride[1] + y * t.stride[2] + (r.left + begin) * t.stride[3];
    const char* from = static_cast<const char*>(t.data) + at * element_size(t.dtype);
    float* row = to + begin * kLanes;
    if (t.stride[1] == 1 && t.dtype == DType::f32) {
      fill_adjacent(reinterpret_cast<const float*>(from), t.stride[3], end - begin, lanes, row);
    } else if (t.stride[1] == 1 && t.dtype == DType::bf16) {
      fill_adjacent(reinterpret_cast<const BFloat16*>(from), t.stride[3], end - begin, lanes, row);
    } else if (t.stride[1] == 1 && t.dtype == DType::f16) {
      fill_adjacent(reinterpret_cast<const Half*>(from), t.stride[3], end - begin, lanes, row);
    } else {
      fill_strided(t, from, end - begin, lanes, row);
    }
  }
}

// Computes B^T d B of a segment's tiles, of one vector of channels.
void transform_inputs(const Plan& p, float* pixels, int64_t step, float* to) {
  const int64_t row = p.pixels() * kLanes;
  for (int64_t at = 0; at < row; at += kLanes) {
    VecF d[kInputs], u[kInputs];
    for (int i = 0; i < kInputs; ++i) d[i] = VecF::load(pixels + i * row + at);
    Transforms::inputs(d, u);
    for (int i = 0; i < kInputs; ++i) u[i].store(pixels + i * row + at);
  }
  for (int64_t i = 0; i < kInputs; ++i) {
    const float* from = pixels + i * row;
    float* point = to + kInputs * i * p.point_x;
    for (int64_t t = 0; t < p.tiles; ++t, from += kOutputs * kLanes, point += step) {
      VecF d[kInputs], u[kInputs];
      for (int j = 0; j < kInputs; ++j) d[j] = VecF::load(from + j * kLanes);
      Transforms::inputs(d, u);
      for (int64_t j = 0; j < kInputs; ++j) u[j].store(point + j * p.point_x);
    }
  }
}

// Computes A e A^T of a segment's tiles, of one vector of channels.
void transform_gradients(const Plan& p, float* pixels, float* to) {
  const int64_t row = kOutputs * p.tiles * kLanes;
  for (int64_t at = 0; at < row; at += kLanes) {
    VecF e[kOutputs], u[kInputs];
    for (int i = 0; i < kOutputs; ++i) e[i] = VecF::load(pixels + i * row + at);
    Transforms::outputs_adjoint(e, u);
    for (int i = 0; i < kInputs; ++i) u[i].store(pixels + i * row + at);
  }
  for (int64_t i = 0; i < kInputs; ++i) {
    const float* from = pixels + i * row;
    float* point = to + kInputs * i * p.point_grad;
    for (int64_t t = 0; t < p.tiles; ++t, from += kOutputs * kLanes, point += kLanes) {
      VecF e[kOutputs], u[kInputs];
      for (int j = 0; j < kOutputs; ++j) e[j] = VecF::load(from + j * kLanes);
      Transforms::outputs_adjoint(e, u);
      for (int64_t j = 0; j < kInputs; ++j) u[j].store(point + j * p.point_grad);
    }
  }
}

// Adds a chunk's products of one point with one panel to the sums, or for the first chunk writes them. It
// processes T output channels at once, with V vectors of input channels.
template <int V, int T>
void multiply(const Plan& p, int64_t tiles, const float* x, const float* grad, bool add, float* sums) {
  for (int64_t start = 0; start < tiles; start += kDepth) {
    const int64_t depth = min_of(kDepth, tiles - start);
    for (int64_t o = 0; o < p.grad_vectors * kLanes; o += T) {
      VecF sum[T][V];
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] = VecF::set(0);
      const float* d = x + start * V * kLanes;
      const float* e = grad + (o / kLanes * p.depth + start) * kLanes + o % kLanes;
      for (int64_t t = 0; t < depth; ++t, d += V * kLanes, e += kLanes) {
        VecF factor[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) factor[v] = VecF::load(d + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          const VecF g = VecF::set(e[i]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(g, factor[v], sum[i][v]);
        }
      }
      float* place = sums + o * V * kLanes;
      const bool first = !add && start == 0;
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v, place += kLanes)
          (first ? sum[i][v] : VecF::load(place) + sum[i][v]).store(place);
    }
  }
}

// Computes the taps of one output channel, (9, panels of input channels).
void finish(const Plan& p, const float* sums, int64_t o, float* taps) {
  const int64_t width = p.vectors * kLanes, outputs = p.grad_vectors * kLanes;
  for (int64_t c = 0; c < p.panels * width; c += kLanes) {
    VecF half[kInputs][3];
    for (int j = 0; j < kInputs; ++j) {
      VecF column[kInputs];
      for (int64_t i = 0; i < kInputs; ++i)
        column[i] = VecF::load(sums + (kInputs * i + j) * p.point_sums + (c / width * outputs + o) * width +
                               c % width);
      Transforms::taps_adjoint(column, half[j]);
    }
    for (int i = 0; i < 3; ++i) {
      VecF row[kInputs], tap[3];
      for (int j = 0; j < kInputs; ++j) row[j] = half[j][i];
      Transforms::taps_adjoint(row, tap);
      for (int j = 0; j < 3; ++j) tap[j].store(taps + (3 * i + j) * p.panels * width + c);
    }
  }
}

template <int V, int T>
void weight_gradient(const WeightGradient& call, int threads) {
  const Plan p(call, V);
  const int64_t width = p.panels * V * kLanes, pixels_per_thread = kInputs * p.pixels() * kLanes;
  Buffer scratch(
      (kPoints * (p.point_x + p.point_grad + p.point_sums) + threads * max_of(pixels_per_thread, 9 * width)) *
      4);
  float* inputs = scratch.take<float>(kPoints * p.point_x);
  float* gradients = scratch.take<float>(kPoints * p.point_grad);
  float* sums = scratch.take<float>(kPoints * p.point_sums);
  float* buffers = scratch.take<float>(threads * max_of(pixels_per_thread, 9 * width));

  const int64_t x_vectors = p.panels * V, tasks = x_vectors + p.grad_vectors;
  for (int64_t begin = 0; begin < p.segments; begin += p.chunk) {
    const int64_t segments = min_of(p.chunk, p.segments - begin);
    parallel_for(threads, threads, [&](int64_t from, int64_t to) {
      for (int64_t thread = from; thread < to; ++thread) {
        float* pixels = buffers + thread * pixels_per_thread;
        for (int64_t i = segments * tasks * thread / threads; i < segments * tasks * (thread + 1) / threads;
             ++i) {
          const int64_t row = (begin + i / tasks) / p.row_segments, task = i % tasks,
                        tile = i / tasks * p.tiles;
          const int64_t top = kOutputs * (row % p.tile_rows),
                        left = kOutputs * p.tiles * ((begin + i / tasks) % p.row_segments);
          if (task < x_vectors) {
            fill(call.x, {row / p.tile_rows, top - 1, left - 1, kInputs, p.pixels(), task * kLanes}, pixels);
            transform_inputs(p, pixels, V * kLanes,
                             inputs + ((task / V * p.depth + tile) * V + task % V) * kLanes);
          } else {
            const int64_t vector = task - x_vectors;
            fill(call.grad, {row / p.tile_rows, top, left, kOutputs, kOutputs * p.tiles, vector * kLanes},
                 pixels);
            transform_gradients(p, pixels, gradients + (vector * p.depth + tile) * kLanes);
          }
        }
      }
    });
    parallel_for(kPoints * p.panels, threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t point = i / p.panels, panel = i % p.panels;
        multiply<V, T>(p, segments * p.tiles, inputs + point * p.point_x + panel * p.depth * V * kLanes,
                       gradients + point * p.point_grad, begin > 0,
                       sums + point * p.point_sums + panel * p.grad_vectors * kLanes * V * kLanes);
      }
    });
  }

  store_weight(call.weight, width, buffers, threads,
               [&](int64_t o, float* taps) { finish(p, sums, o, taps); });
}

}  // namespace

void conv3x3_float32_weight_gradient(const WeightGradient& call, int threads) {
  constexpr int kMost = kLanes < 8 ? kLanes : 8;  // output channels at once; they are in one vector
  const int64_t vectors = ceil_div(call.x.size[1], kLanes);
  switch (panel_vectors(vectors)) {
    case 1:
      return weight_gradient<1, kMost>(call, threads);
#if defined(__AVX512F__) || defined(__aarch64__)  // at most 24 of 32 registers hold sums
    case 2:
      return weight_gradient<2, kMost>(call, threads);
    case 3:
      return weight_gradient<3, kMost>(call, threads);
    default:
      return weight_gradient<4, 4>(call, threads);
#else  // at most 12 of 16 registers hold sums
    case 2:
      return weight_gradient<2, 4>(call, threads);
    default:
      return weight_gradient<3, 4>(call, threads);
#endif
  }
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
