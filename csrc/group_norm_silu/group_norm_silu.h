// The calls of GroupNorm+SiLU in the core: y = z sigmoid(z) with z = (x - mean) rstd weight + bias.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

namespace litevae {
namespace group_norm_silu {

// A missing tensor has a null `data`. The channels are those of x, followed by those of skip.
struct Inputs {
  TensorView x;             // (N, C_x, H, W)
  TensorView skip;          // (N, C_skip, H, W), same dtype as x
  TensorView weight, bias;  // (1, C, 1, 1), each with any dtype
  TensorView offset;        // (1, C, 1, 1), any dtype: added to x and skip before the norm; forward only
  double* stats;            // (N, groups, 2): mean and rstd = 1 / sqrt(var + eps) of each group
  int64_t groups;

  int64_t batch() const { return x.size[0]; }
  int64_t channels() const { return x.size[1] + (skip.data ? skip.size[1] : 0); }
  int64_t height() const { return x.size[2]; }
  int64_t width() const { return x.size[3]; }
};

struct Forward {
  Inputs in;
  TensorView y;  // (N, C, H, W), same dtype as x; written, as are the statistics
  double eps;
  // On a GPU: mean and variance of each channel of x (N, C_x, 2) and of skip (N, C_skip, 2), which take the
  // place of a pass over them; or null.
  const double* given[2] = {};
};

struct Backward {
  Inputs in;
  TensorView grad;                    // (N, C, H, W), same dtype as x
  TensorView grad_x, grad_skip;       // written
  TensorView grad_weight, grad_bias;  // (1, C, 1, 1), written, same dtypes as weight and bias
};

// y += residuals + biases, rounded once; only on a GPU. A missing tensor has a null `data`.
struct Addition {
  TensorView y;             // (N, C, H, W)
  TensorView residuals[2];  // (N, C, H, W), each with any dtype
  TensorView biases[2];     // (1, C, 1, 1), each with any dtype
  double* statistics;       // (N, C, 2): mean and variance of each channel of the sum; written, or null
};

// What a GPU offers to thread-block clusters.
struct Card {
  int64_t multiprocessors;
  int64_t shared;  // bytes of shared memory per block, at most
  int64_t blocks;  // per cluster, at most; 0 if the GPU or the core has no clusters
};

// How clusters serve a call.
struct Clusters {
  int64_t count;   // 0 if they do not
  int64_t blocks;  // per cluster
  int64_t shared;  // bytes of shared memory per block
};

}  // namespace group_norm_silu

// Only in a core with CUDA. `scratch` has group_norm_silu_scratch_bytes() bytes, aligned to 16 bytes.
int64_t group_norm_silu_scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element_size);
// `clusters`: whether one pass in clusters may serve the call.
void group_norm_silu_forward_cuda(const group_norm_silu::Forward& call, void* scratch, int device,
                                  void* stream, bool clusters);
void group_norm_silu_backward_cuda(const group_norm_silu::Backward& call, void* scratch, int device,
                                   void* stream);
// Without statistics, `scratch` is unused.
void add_residuals_cuda(const group_norm_silu::Addition& call, void* scratch, int device, void* stream);

// Only in a core that was built for sm_90 or newer GPUs. The choice depends on shape, dtype, layout and card.
group_norm_silu::Clusters group_norm_silu_clusters(const group_norm_silu::Forward& call,
                                                   const group_norm_silu::Card& card);
group_norm_silu::Card group_norm_silu_card(int device);
// Returns false, and does nothing, if clusters do not serve the call.
bool group_norm_silu_forward_clusters(const group_norm_silu::Forward& call, int device, void* stream);

}  // namespace litevae
