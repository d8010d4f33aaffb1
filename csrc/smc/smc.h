// The weight of a self-modulated convolution (Equation 3) and its gradient, as the core's functions take
// them: w'[o,i,k] = gain scale[i] w[o,i,k] / (norm[o] + eps), norm[o] = sqrt(sum_{i,k} (scale[i]
// w[o,i,k])^2).
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

namespace litevae {
namespace smc {

// A missing tensor has no data.
struct Inputs {
  TensorView weight;  // (O, I, K_h, K_w)
  TensorView scale;   // (1, groups I, 1, 1); the first channel of filter o is o / (O / groups) * I
  TensorView gain;    // (1, 1, 1, 1)
  TensorView norm;    // (1, O, 1, 1), f64 or f32, the type of the arithmetic
  double eps;

  int64_t groups() const { return scale.size[1] / weight.size[1]; }
};

struct Forward {
  Inputs in;
  TensorView modulated;  // (O, I, K_h, K_w); written, as is the norm
};

struct Backward {
  Inputs in;
  TensorView grad;                                // (O, I, K_h, K_w)
  TensorView grad_weight, grad_scale, grad_gain;  // written, of the shapes and dtypes of the inputs
};

}  // namespace smc

// Only in a core with CUDA. `scratch` has modulate_weight_scratch_bytes(weight, norm) bytes.
int64_t modulate_weight_scratch_bytes(const TensorView& weight, const TensorView& norm);
void modulate_weight_forward_cuda(const smc::Forward& call, int device, void* stream);
void modulate_weight_backward_cuda(const smc::Backward& call, void* scratch, int device, void* stream);

}  // namespace litevae
