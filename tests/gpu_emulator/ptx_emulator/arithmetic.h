// The arithmetic of PTX on the 32 lanes of a warp. A register holds its bits in the low end of 64.
#pragma once

#include <array>

#include "ptx.h"

namespace ptx {

constexpr int kWarp = 32;
using Lanes = std::array<uint64_t, kWarp>;

// Computes the arithmetic instructions (see Op). `from` has one row of lanes per source; `second` is the
// second result of a comparison. Lanes that are inactive may hold anything.
void compute(const Instruction& in, const uint64_t* const* from, Lanes& out, Lanes& second);

// The value of a floating-point number's bits.
double number_of(uint64_t bits, Type type);

inline uint64_t cut(uint64_t value, Type type) {
  const int bits = 8 * size_of(type);
  return bits == 64 ? value : value & ((uint64_t{1} << bits) - 1);
}

}  // namespace ptx
