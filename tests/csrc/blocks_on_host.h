// Runs kernels whose threads work together (csrc/common/block.cuh) on the CPU: block after block, and within
// a block phase after phase.
#pragma once

#include <cstring>
#include <set>
#include <string>
#include <typeinfo>

#include "../../csrc/common/block.cuh"

namespace litevae {
namespace {

int64_t misaligned;
std::set<std::string> ran;  // kernels, under the compiler's names

// A GPU raises an error at a vector access that is not aligned.
void check_alignment(const void* address, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) ++misaligned;
}

struct Loop {
  template <class Body, class Pass>
  void operator()(Body, const Pass& p, int dynamic_shared = 0) const {
    ran.insert(typeid(Body).name());
    if (p.threads > Body::kMaxThreads || p.threads < 1 || p.threads % 32 != 0 || p.blocks < 1) ++misaligned;
    static typename Body::Shared shared;
    std::vector<double> dynamic(dynamic_shared / 8 + 1);
    for (int64_t index = 0; index < p.blocks; ++index) {
      // NaN, because a block must have written whatever it reads
      std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
      std::memset(dynamic.data(), 0xff, 8 * dynamic.size());
      static bool backwards = false;
      Body::run(p, index, Block{p.threads, dynamic.data(), backwards = !backwards}, shared);
    }
  }
};

// Ten numbers per tensor: address (0 if it is missing), dtype, sizes, strides.
TensorView view(const int64_t* numbers) {
  TensorView t{};
  t.data = reinterpret_cast<void*>(numbers[0]), t.dtype = static_cast<DType>(numbers[1]);
  for (int i = 0; i < 4; ++i) t.size[i] = numbers[2 + i], t.stride[i] = numbers[6 + i];
  return t;
}

}  // namespace
}  // namespace litevae

// Returns the kernels that ran since the last call, one per line.
extern "C" const char* kernels_that_ran() {
  static std::string names;
  names.clear();
  for (const std::string& name : litevae::ran) names += name + "\n";
  litevae::ran.clear();
  return names.c_str();
}
