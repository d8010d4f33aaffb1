// Starts kernels of blocks that work together: a type with `run(pass, block, threads, shared)` is a kernel.
//
// Nothing here synchronises or allocates, so calls can be captured in a CUDA graph.
#pragma once

#include <stdexcept>
#include <string>

#include "block.cuh"

namespace litevae {
namespace {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("litevae: ") + what + " failed: " + cudaGetErrorString(error));
}

template <class Body, class Pass>
__global__ void __launch_bounds__(Body::kMaxThreads, Body::kMinBlocks)
    block_kernel(const __grid_constant__ Pass p) {
  __shared__ typename Body::Shared shared;
  extern __shared__ double2 more[];
  const int64_t index = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (index < p.blocks) Body::run(p, index, Block{static_cast<int>(blockDim.x), more}, shared);
}

struct Launch {
  const char* what;
  cudaStream_t stream;

  Launch(const char* what, int device, void* stream) : what(what), stream(static_cast<cudaStream_t>(stream)) {
    check(cudaSetDevice(device), "cudaSetDevice");
  }

  // `p` has the numbers of blocks and of threads; `more`: bytes of shared memory beside Body::Shared.
  template <class Body, class Pass>
  void operator()(Body, const Pass& p, int more = 0) const {
    if (more + sizeof(typename Body::Shared) > 48 * 1024)  // only after asking
      check(cudaFuncSetAttribute(block_kernel<Body, Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, more),
            what);
    constexpr int64_t kMaxBlocks = 0x7fffffff;
    const int64_t rows = (p.blocks + kMaxBlocks - 1) / kMaxBlocks, columns = (p.blocks + rows - 1) / rows;
    const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    block_kernel<Body><<<grid, p.threads, more, stream>>>(p);
    check(cudaGetLastError(), what);
  }
};

}  // namespace
}  // namespace litevae
