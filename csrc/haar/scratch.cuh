// The size of the scratch memory that the passes of a transform (plan.cuh) exchange.
#pragma once

#include "tile.cuh"

namespace litevae {
namespace haar {
namespace {

// A pass computes up to kPassLevels levels. The LL between two passes waits in scratch memory, in the type of
// the arithmetic.
inline int64_t scratch_bytes(const Transform& call) {
  const bool in_double = call.image_dtype == DType::f64 || call.coeff_dtype == DType::f64;
  int64_t height = call.height, width = call.width, elements = 0;
  for (int level = 1; level < call.levels; ++level) {
    height = half_up(height), width = half_up(width);
    if (level % kPassLevels == 0) elements += call.batch * call.channels * height * width;
  }
  return elements * element_size(in_double ? DType::f64 : DType::f32);
}

}  // namespace
}  // namespace haar
}  // namespace litevae
