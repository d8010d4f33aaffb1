// Haar analysis and synthesis on a GPU: launches. plan.cuh decides what is launched, and tile.cuh has what a
// thread does.
//
// Nothing here synchronises or allocates, so calls can be captured in a CUDA graph.
#include "../common/cuda_error.cuh"
#include "plan.cuh"
#include "scratch.cuh"

namespace litevae {
namespace haar {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class Body>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Pass p) {
  if constexpr (Body::kTogether) {
    // All threads stay together. Those past the end repeat the last one's work, and store the same values.
    for (int64_t block = blockIdx.x; block * kThreads < p.threads; block += gridDim.x) {
      const int64_t thread = block * kThreads + threadIdx.x;
      Body::run(p, thread < p.threads ? thread : p.threads - 1);
    }
  } else {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; thread < p.threads;
         thread += step)
      Body::run(p, thread);
  }
}

struct Launch {
  cudaStream_t stream;

  template <class Body>
  void operator()(Body, const Pass& p) const {
    const int64_t blocks = (p.threads + kThreads - 1) / kThreads;
    kernel<Body>
        <<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(p);
    check(cudaGetLastError(), Body::kAnalysis ? "the haar_analysis kernel" : "the haar_synthesis kernel");
  }
};

template <bool kAnalysis>
void run_on(const Transform& call, void* scratch, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  run<kAnalysis>(call, scratch, Launch{static_cast<cudaStream_t>(stream)});
}

}  // namespace
}  // namespace haar

int64_t haar_scratch_bytes(const haar::Transform& call) { return haar::scratch_bytes(call); }

void haar_analysis_cuda(const haar::Transform& call, void* scratch, int device, void* stream) {
  haar::run_on<true>(call, scratch, device, stream);
}

void haar_synthesis_cuda(const haar::Transform& call, void* scratch, int device, void* stream) {
  haar::run_on<false>(call, scratch, device, stream);
}

}  // namespace litevae
