// A 3x3 convolution (stride 1, padding of one zero) and its gradients, as the core's functions take them:
// y = conv(x) + bias + residual, or conv(silu(x)) + bias + residual, rounded once.
//
// Two sets of kernels serve it. The bf16 kernels (cpu.cpp, weight_gradient.cpp) multiply in bfloat16 and need
// AVX512-BF16. In addition to y, which any convolution rounds, they round both transformed factors to
// bfloat16, and their error is about 2.5 times that of a direct convolution. The float32 kernels
// (float32.cpp, float32_weight_gradient.cpp) serve every CPU and every storage type but float64.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

namespace litevae {
namespace conv3x3 {

// A group normalisation of the input, before the SiLU. The channels of `skip` follow those of x. The float32
// kernels apply it only if x has whole vectors of channels or there is no `skip`.
struct Norm {
  TensorView skip;          // (N, I - I_x, H, W), or missing
  TensorView weight, bias;  // (1, I, 1, 1), any dtype, or missing
  const double* stats;      // (N, groups, 2): mean and 1 / sqrt(var + eps); null without a norm
  int64_t groups;
};

// A missing tensor has no data. For the bf16 kernels, x, skip, residual and y are bf16 with channels
// innermost. For the float32 kernels they have one dtype, and each has adjacent channels or adjacent pixels
// of a row.
struct Forward {
  TensorView x;  // (N, I, H, W), or its first channels if the norm has a `skip`
  Norm norm;
  bool silu;
  TensorView weight;  // (O, I, 3, 3), any strides and any dtype but float64; rounded to x's dtype
  // If set, the weight is (I, O, 3, 3) and rotated by 180 degrees, and y is the gradient of a convolution's
  // input.
  bool transposed;
  TensorView bias;      // (1, O, 1, 1), any dtype
  TensorView residual;  // (N, O, H, W)
  TensorView y;         // (N, O, H, W); written

  int64_t inputs() const { return x.size[1] + (norm.skip.data ? norm.skip.size[1] : 0); }
};

// The gradient of a convolution's weight. For the bf16 kernels, x and grad are bf16 with channels innermost.
// The float32 kernels take any strides, and any dtype but float64.
struct WeightGradient {
  TensorView x;       // (N, I, H, W)
  TensorView grad;    // (N, O, H, W), of the convolution's result
  TensorView weight;  // (O, I, 3, 3), any dtype and strides; written
};

// The size of the float32 kernels' tiles of outputs: the one that takes fewer multiplications. Larger tiles
// pad more, and they have more weights to transform, which counts in small images. It is chosen per image, so
// that an image's result does not depend on the other images of the batch.
static inline int output_tile(int64_t height, int64_t width) {
  const int64_t weights = 6;  // tiles whose products take as long as transforming the weights
  const auto cost = [&](int64_t tile) {
    const int64_t tiles = ((height + tile - 1) / tile) * ((width + tile - 1) / tile);
    return (tile + 2) * (tile + 2) * (tiles + weights);
  };
  return cost(4) <= cost(2) ? 4 : 2;
}

constexpr int kPoints = 16;     // points of a transformed tile or kernel
constexpr int64_t kLanes = 16;  // output channels per vector
constexpr int64_t kRun = 32;    // input channels per run; they are padded to whole runs

// Output channels are processed in panels of 2, 3 or 4 vectors: the width that pads least, and of those the
// widest.
static inline int64_t panel_vectors(int64_t outputs) {
  const int64_t vectors = (outputs + kLanes - 1) / kLanes;
  int64_t best = 4;
  for (int64_t width = 3; width >= 2; --width)
    if ((vectors + width - 1) / width * width < (vectors + best - 1) / best * best) best = width;
  return best;
}
static inline int64_t padded_inputs(int64_t inputs) { return (inputs + kRun - 1) / kRun * kRun; }
static inline int64_t panels(int64_t outputs) {
  const int64_t width = panel_vectors(outputs) * kLanes;
  return (outputs + width - 1) / width;
}
// Size of the transformed weights.
static inline int64_t packed_bytes(int64_t inputs, int64_t outputs) {
  return 16 * padded_inputs(inputs) * panels(outputs) * panel_vectors(outputs) * kLanes * 2;
}

}  // namespace conv3x3
}  // namespace litevae
