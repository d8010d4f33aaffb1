// Entry points of weight modulation on a GPU.
#include "../common/launch.cuh"
#include "kernels.cuh"

namespace litevae {

int64_t modulate_weight_scratch_bytes(const TensorView& weight, const TensorView& norm) {
  return smc::scratch_bytes(weight, norm);
}

void modulate_weight_forward_cuda(const smc::Forward& call, int device, void* stream) {
  smc::run(call, Launch("the modulate_weight kernel", device, stream));
}

void modulate_weight_backward_cuda(const smc::Backward& call, void* scratch, int device, void* stream) {
  smc::run(call, scratch, Launch("the modulate_weight_backward kernel", device, stream));
}

}  // namespace litevae
