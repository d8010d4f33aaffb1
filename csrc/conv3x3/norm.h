// The coefficients of a convolution's group normalisation. Everything has internal linkage, because it is
// compiled once per instruction set.
#pragma once

#include "../common/vector.h"
#include "conv3x3.h"

namespace litevae {
namespace {

// The number of coefficients, with channels padded to `padded`; none without a norm.
int64_t norm_floats(const conv3x3::Forward& call, int64_t padded) {
  return call.norm.stats == nullptr ? 0 : call.x.size[0] * 3 * padded;
}

// Stores means, factors and offsets (N, 3, padded), with which x is normalised as (x - mean) factor + offset.
// What the mean loses when it is rounded goes into the offset. Padding channels get zeros.
void fill_norm(const conv3x3::Forward& call, int64_t padded, float* to) {
  const conv3x3::Norm& norm = call.norm;
  if (norm.stats == nullptr) return;
  const int64_t channels = call.inputs(), each = channels / norm.groups;
  for (int64_t n = 0; n < call.x.size[0]; ++n, to += 3 * padded) {
    for (int64_t c = 0; c < channels; ++c) {
      const double* stats = norm.stats + 2 * (n * norm.groups + c / each);
      const float mean = static_cast<float>(stats[0]);
      const double factor = stats[1] * value(norm.weight, c, 1);
      to[c] = mean;
      to[padded + c] = static_cast<float>(factor);
      to[2 * padded + c] = static_cast<float>(value(norm.bias, c, 0) - (stats[0] - mean) * factor);
    }
    for (int64_t c = channels; c < padded; ++c) to[c] = to[padded + c] = to[2 * padded + c] = 0;
  }
}

}  // namespace
}  // namespace litevae
