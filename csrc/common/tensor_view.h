// A tensor as the core takes it: address, element type, sizes and strides. The core does not use PyTorch.
#pragma once

#include <cstdint>

namespace litevae {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Sizes and strides are in elements and in the order NCHW. Any strides are allowed, including zero.
struct TensorView {
  void* data;
  DType dtype;
  int64_t size[4];
  int64_t stride[4];
};

}  // namespace litevae
