// Runs the CUDA kernels of weight modulation on the CPU. test_smc_cuda_on_host.py compiles and calls it.
#include "../../csrc/smc/kernels.cuh"
#include "blocks_on_host.h"

using namespace litevae;

// `tensors`: weight, norm.
extern "C" int64_t scratch_bytes(const int64_t* tensors) {
  return smc::scratch_bytes(view(tensors), view(tensors + 10));
}

// `tensors`: weight, scale, gain, norm, modulated. Returns the number of misaligned accesses.
extern "C" int64_t forward(const int64_t* tensors, double eps) {
  misaligned = 0;
  const smc::Inputs in{view(tensors), view(tensors + 10), view(tensors + 20), view(tensors + 30), eps};
  smc::run(smc::Forward{in, view(tensors + 40)}, Loop());
  return misaligned;
}

// `tensors`: weight, scale, gain, norm, grad, grad_weight, grad_scale, grad_gain.
extern "C" int64_t backward(const int64_t* tensors, double eps, void* scratch) {
  misaligned = 0;
  const smc::Inputs in{view(tensors), view(tensors + 10), view(tensors + 20), view(tensors + 30), eps};
  smc::run(smc::Backward{in, view(tensors + 40), view(tensors + 50), view(tensors + 60), view(tensors + 70)},
           scratch, Loop());
  return misaligned;
}
