#include "tensor_core.h"

#include <algorithm>
#include <cmath>

namespace ptx {
namespace {

constexpr int kStep = 8;           // products that are added up at once
constexpr int kFractionBits = 24;  // of the terms, below the largest one's exponent

uint64_t decoded(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3fff) << 4; }

uint64_t swizzle_width(uint64_t descriptor) {
  const int mode = static_cast<int>(descriptor >> 62);
  return mode == 0 ? 16 : 256 >> mode;
}

float towards_zero(double value) {
  const float rounded = static_cast<float>(value);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(value) ? std::nextafterf(rounded, 0) : rounded;
}

}  // namespace

float multiply_add(float sum, const double* a, const double* b) {
  for (int first = 0; first < kDepth; first += kStep) {
    double terms[kStep + 1];
    double largest = std::fabs(terms[kStep] = sum), exact = sum;
    for (int i = 0; i < kStep; ++i) {
      terms[i] = a[first + i] * b[first + i];
      largest = std::max(largest, std::fabs(terms[i])), exact += terms[i];
    }
    if (!std::isfinite(exact) || largest == 0) {
      sum = static_cast<float>(exact);
      continue;
    }
    const int last_bit = std::ilogb(largest) - kFractionBits;
    const double scale = std::ldexp(1., -last_bit);
    int64_t total = 0;
    for (const double term : terms) total += static_cast<int64_t>(term * scale);
    sum = towards_zero(std::ldexp(static_cast<double>(total), last_bit));
  }
  return sum;
}

SharedMatrix::SharedMatrix(uint64_t descriptor, bool transposed)
    : transposed(transposed),
      start(decoded(descriptor, 0)),
      leading(decoded(descriptor, 16)),
      stride(decoded(descriptor, 32)),
      width(swizzle_width(descriptor)) {
  if ((descriptor >> 49 & 7) != 0)
    fail("a matrix descriptor with a base offset, which the emulator does not know");
}

uint64_t SharedMatrix::chunk(int across, int along) const {
  const uint64_t row = transposed ? along : across, column = 2 * (transposed ? across : along);
  // Tiles of 8 rows of `width` bytes. Without a swizzle, the two offsets change places.
  const bool swapped = transposed && width == 16;
  const uint64_t down = swapped ? leading : stride;
  const uint64_t right = swapped ? stride : transposed || width == 16 ? leading : width;
  const uint64_t address = start + row / 8 * down + row % 8 * width + column / width * right + column % width;
  return address ^ (address >> 3 & (width - 16));
}

}  // namespace ptx
