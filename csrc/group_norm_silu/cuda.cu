// The entry points of GroupNorm+SiLU on a GPU, and of the addition that measures its input. plan.cuh launches
// the kernels, and kernels.cuh defines them; addition.cuh does both for the addition.
#include "../common/launch.cuh"
#include "addition.cuh"

namespace litevae {

int64_t group_norm_silu_scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element) {
  return group_norm_silu::scratch_bytes(batch, channels, pixels, element);
}

void group_norm_silu_forward_cuda(const group_norm_silu::Forward& call, void* scratch, int device,
                                  void* stream, bool clusters) {
#ifdef LITEVAE_CLUSTERS
  if (clusters && group_norm_silu_forward_clusters(call, device, stream)) return;
#else
  (void)clusters;
#endif
  group_norm_silu::run(call, scratch, Launch("the group_norm_silu kernel", device, stream));
}

void group_norm_silu_backward_cuda(const group_norm_silu::Backward& call, void* scratch, int device,
                                   void* stream) {
  group_norm_silu::run(call, scratch, Launch("the group_norm_silu_backward kernel", device, stream));
}

void add_residuals_cuda(const group_norm_silu::Addition& call, void* scratch, int device, void* stream) {
  group_norm_silu::run(call, scratch, Launch("the add_residuals kernel", device, stream));
}

}  // namespace litevae
