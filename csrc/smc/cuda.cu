// Weight modulation on a GPU: entry points.
#include "../common/launch.cuh"
#include "kernels.cuh"

namespace litevae {

void modulate_weight_forward_cuda(const smc::Forward& call, int device, void* stream) {
  smc::run(call, Launch("the modulate_weight kernel", device, stream));
}

// `scratch`: see run() in kernels.cuh.
void modulate_weight_backward_cuda(const smc::Backward& call, void* scratch, int device, void* stream) {
  smc::run(call, scratch, Launch("the modulate_weight_backward kernel", device, stream));
}

}  // namespace litevae
