// Launches kernels whose threads work together (block.cuh). A type with `run(pass, index, block, shared)` is
// a kernel.
//
// Nothing here synchronises or allocates, so calls can be captured in a CUDA graph.
#pragma once

#include "block.cuh"
#include "cuda_error.cuh"

namespace litevae {
namespace {

template <class Body, class Pass>
__global__ void __launch_bounds__(Body::kMaxThreads, Body::kMinBlocks)
    block_kernel(const __grid_constant__ Pass p) {
  __shared__ typename Body::Shared shared;
  extern __shared__ double2 dynamic_shared[];
  const int64_t index = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (index < p.blocks) Body::run(p, index, Block{static_cast<int>(blockDim.x), dynamic_shared}, shared);
}

struct Launch {
  const char* name;  // for error messages
  cudaStream_t stream;

  Launch(const char* name, int device, void* stream) : name(name), stream(static_cast<cudaStream_t>(stream)) {
    check(cudaSetDevice(device), "cudaSetDevice");
  }

  // `p` has the numbers of blocks and of threads. `dynamic_shared` is a number of bytes, in addition to
  // Body::Shared.
  template <class Body, class Pass>
  void operator()(Body, const Pass& p, int dynamic_shared = 0) const {
    if (dynamic_shared + sizeof(typename Body::Shared) > 48 * 1024)  // CUDA grants this only on request
      check(cudaFuncSetAttribute(block_kernel<Body, Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 dynamic_shared),
            name);
    constexpr int64_t kMaxBlocks = 0x7fffffff;
    const int64_t rows = (p.blocks + kMaxBlocks - 1) / kMaxBlocks, columns = (p.blocks + rows - 1) / rows;
    const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    block_kernel<Body><<<grid, p.threads, dynamic_shared, stream>>>(p);
    check(cudaGetLastError(), name);
  }
};

}  // namespace
}  // namespace litevae
