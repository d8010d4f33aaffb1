// Runs kernels whose threads work together (csrc/common/block.cuh) on the CPU: one block after the other, and
// of a block one phase after the other.
#pragma once

#include <cstring>
#include <set>
#include <string>
#include <typeinfo>

#include "../../csrc/common/block.cuh"

namespace litevae {
namespace {

int64_t misaligned;
std::set<std::string> ran;  // kernels, by the compiler's names

// A GPU stops at a vector access that is not aligned.
void check_alignment(const void* address, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) ++misaligned;
}

struct Loop {
  template <class Body, class Pass>
  void operator()(Body, const Pass& p, int more = 0) const {
    ran.insert(typeid(Body).name());
    if (p.threads > Body::kMaxThreads || p.threads < 1 || p.threads % 32 != 0 || p.blocks < 1) ++misaligned;
    static typename Body::Shared shared;
    std::vector<double> rest(more / 8 + 1);
    for (int64_t index = 0; index < p.blocks; ++index) {
      // NaN: what a block reads it must have written
      std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
      std::memset(rest.data(), 0xff, 8 * rest.size());
      static bool backwards = false;
      Body::run(p, index, Block{p.threads, rest.data(), backwards = !backwards}, shared);
    }
  }
};

// Ten numbers a tensor: address (0: not there), dtype, sizes, strides.
TensorView view(const int64_t* numbers) {
  TensorView t{};
  t.data = reinterpret_cast<void*>(numbers[0]), t.dtype = static_cast<DType>(numbers[1]);
  for (int i = 0; i < 4; ++i) t.size[i] = numbers[2 + i], t.stride[i] = numbers[6 + i];
  return t;
}

}  // namespace
}  // namespace litevae

// The kernels that ran since the last call, one a line.
extern "C" const char* kernels_that_ran() {
  static std::string names;
  names.clear();
  for (const std::string& name : litevae::ran) names += name + "\n";
  litevae::ran.clear();
  return names.c_str();
}
