// Runs the CUDA kernels of GroupNorm+SiLU on the CPU. test_group_norm_silu_cuda_on_host.py compiles and calls
// this.
#include "../../csrc/group_norm_silu/plan.cuh"
#include "blocks_on_host.h"

using namespace litevae;

namespace {

group_norm_silu::Inputs inputs(const int64_t* tensors, double* stats, int64_t groups) {
  return {view(tensors), view(tensors + 10), view(tensors + 20), view(tensors + 30), stats, groups};
}

}  // namespace

extern "C" int64_t scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element) {
  return group_norm_silu::scratch_bytes(batch, channels, pixels, element);
}

// `tensors` are x, skip, weight, bias and y. Returns the number of misaligned accesses.
extern "C" int64_t forward(const int64_t* tensors, double* stats, int64_t groups, double eps, void* scratch) {
  misaligned = 0;
  group_norm_silu::run(group_norm_silu::Forward{inputs(tensors, stats, groups), view(tensors + 40), eps},
                       scratch, Loop());
  return misaligned;
}

// `tensors` are x, skip, weight, bias, grad, grad_x, grad_skip, grad_weight and grad_bias.
extern "C" int64_t backward(const int64_t* tensors, double* stats, int64_t groups, void* scratch) {
  misaligned = 0;
  group_norm_silu::Backward call{inputs(tensors, stats, groups),
                                 view(tensors + 40),
                                 view(tensors + 50),
                                 view(tensors + 60),
                                 view(tensors + 70),
                                 view(tensors + 80)};
  group_norm_silu::run(call, scratch, Loop());
  return misaligned;
}
