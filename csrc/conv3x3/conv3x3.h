// A 3x3 convolution (stride 1, one pixel of zeros around) of bfloat16 tensors as the core sees it:
// y = conv(activation(x and skip side by side)) + bias + residual, rounded once. Needs AVX512-BF16.
// The rms error is about 2.5 times that of a direct convolution, which rounds the result only. Faster than
// that from 32 channels on both sides on: channels are padded to 32.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"
#include "../group_norm_silu/group_norm_silu.h"

namespace litevae {
namespace conv3x3 {

enum class Activation : int { none = 0, silu = 1, norm_silu = 2 };

// A tensor that is not there has no data. x, skip, residual and y are bf16 with channels innermost.
struct Forward {
  group_norm_silu::Inputs in;  // the statistics are read, for norm_silu only, as are the weight and the bias
  Activation activation;
  const void* packed;   // what conv3x3_pack wrote
  TensorView bias;      // (1, O, 1, 1), any dtype
  TensorView residual;  // (N, O, H, W)
  TensorView y;         // (N, O, H, W); written
};

struct Pack {
  TensorView weight;  // (O, I, 3, 3), any dtype
  void* packed;       // packed_bytes(I, O) bytes, aligned to 64; written
};

constexpr int64_t kLanes = 16;  // output channels a vector
constexpr int64_t kRun = 32;    // input channels are padded to whole runs

// Output channels are worked on in panels of 2, 3 or 4 vectors: the widest of those that pad least.
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
static inline int64_t packed_bytes(int64_t inputs, int64_t outputs) {
  return 16 * padded_inputs(inputs) * panels(outputs) * panel_vectors(outputs) * kLanes * 2;
}

}  // namespace conv3x3
}  // namespace litevae
