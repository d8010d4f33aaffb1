// Errors of the CUDA runtime as C++ exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace litevae {
namespace {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("litevae: ") + what + " failed: " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace litevae
