// GroupNorm+SiLU as the core sees it: y = z sigmoid(z), z = (x - mean) rstd weight + bias.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

namespace litevae {
namespace group_norm_silu {

// A tensor that is not there has no data. The channels are those of x, then those of skip.
struct Inputs {
  TensorView x;             // (N, C_x, H, W)
  TensorView skip;          // (N, C_skip, H, W), of x's dtype
  TensorView weight, bias;  // (1, C, 1, 1), each of any dtype
  double* stats;            // (N, groups, 2): mean and rstd = 1 / sqrt(var + eps) of each group
  int64_t groups;

  int64_t batch() const { return x.size[0]; }
  int64_t channels() const { return x.size[1] + (skip.data ? skip.size[1] : 0); }
  int64_t height() const { return x.size[2]; }
  int64_t width() const { return x.size[3]; }
};

struct Forward {
  Inputs in;
  TensorView y;  // (N, C, H, W), of x's dtype; written, as are the statistics
  double eps;
};

struct Backward {
  Inputs in;
  TensorView grad;                    // (N, C, H, W), of x's dtype
  TensorView grad_x, grad_skip;       // written
  TensorView grad_weight, grad_bias;  // (1, C, 1, 1), written, of weight's and bias's dtypes
};

}  // namespace group_norm_silu

// Only in a core with CUDA. `scratch` has group_norm_silu_scratch_bytes() bytes, aligned to 16 bytes.
int64_t group_norm_silu_scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element_size);
void group_norm_silu_forward_cuda(const group_norm_silu::Forward& call, void* scratch, int device,
                                  void* stream);
void group_norm_silu_backward_cuda(const group_norm_silu::Backward& call, void* scratch, int device,
                                   void* stream);

}  // namespace litevae
