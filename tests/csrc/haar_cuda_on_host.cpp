// Runs every thread of the CUDA Haar kernels in a loop on the CPU. test_haar_cuda_on_host.py compiles and
// calls this file.
#include <cstdio>

#include "../../csrc/haar/plan.cuh"
#include "../../csrc/haar/scratch.cuh"

namespace litevae {
namespace {

int64_t misaligned, inside_threads, edge_threads;
int64_t kinds;  // bit k: at least one pass used Kind k

// A misaligned vector access is an error on a GPU.
void check_alignment(const void* address, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) ++misaligned;
}

struct Loop {
  template <bool kAnalysis, class From, class T, int kLevels, haar::Kind kKind>
  void operator()(haar::Inside<kAnalysis, From, T, kLevels, kKind>, const haar::Pass& p) const {
    inside_threads += p.threads;
    kinds |= 1 << static_cast<int>(kKind);
    for (int64_t thread = 0; thread < p.threads; ++thread)
      haar::Inside<kAnalysis, From, T, kLevels, kKind>::run(p, thread);
  }
  template <bool kAnalysis, class T>
  void operator()(haar::Edge<kAnalysis, T>, const haar::Pass& p) const {
    edge_threads += p.threads;
    for (int64_t thread = 0; thread < p.threads; ++thread) haar::Edge<kAnalysis, T>::run(p, thread);
  }
};

}  // namespace
}  // namespace litevae

extern "C" int64_t scratch_bytes(const int64_t* size, int levels, int image_dtype, int coeff_dtype) {
  using namespace litevae;
  haar::Transform t{};
  t.batch = size[0], t.channels = size[1], t.height = size[2], t.width = size[3], t.levels = levels;
  t.image_dtype = static_cast<DType>(image_dtype), t.coeff_dtype = static_cast<DType>(coeff_dtype);
  return haar::scratch_bytes(t);
}

// `tensors`: address and four strides of the image and then of LL, H, V, D of each level, finest first;
// address 0: no such band. `report`: misaligned accesses, fast threads, slow threads, kinds of kernels.
extern "C" void run_haar(int analysis, const int64_t* size, int levels, int mode, double factor,
                         int image_dtype, int coeff_dtype, const int64_t* tensors, void* scratch,
                         int64_t* report) {
  using namespace litevae;
  haar::Transform t{};
  t.batch = size[0], t.channels = size[1], t.height = size[2], t.width = size[3];
  t.levels = levels, t.mode = static_cast<haar::Mode>(mode), t.factor = factor;
  t.image_dtype = static_cast<DType>(image_dtype), t.coeff_dtype = static_cast<DType>(coeff_dtype);
  const auto band = [&](int i) {
    const int64_t* v = tensors + 5 * i;
    return haar::Band{reinterpret_cast<char*>(v[0]), v[1], v[2], v[3], v[4]};
  };
  t.image = band(0);
  for (int level = 0; level < levels; ++level)
    for (int i = 0; i < 4; ++i) t.bands[level][i] = band(1 + 4 * level + i);
  misaligned = inside_threads = edge_threads = kinds = 0;
  analysis ? haar::run<true>(t, scratch, Loop()) : haar::run<false>(t, scratch, Loop());
  report[0] = misaligned, report[1] = inside_threads, report[2] = edge_threads, report[3] = kinds;
}
