// A tensor as the core sees it: address, element type, sizes and strides. No PyTorch anywhere.
#pragma once

#include <cstdint>

namespace litevae {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Sizes and strides are in elements, NCHW order; strides may be anything, zero included.
struct TensorView {
  void* data;
  DType dtype;
  int64_t size[4];
  int64_t stride[4];
};

}  // namespace litevae
