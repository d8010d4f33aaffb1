// The arithmetic of tensor cores, and where a warp's registers and shared memory hold the elements of
// matrices.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace ptx {

constexpr int kRows = 16, kDepth = 16;  // of the left factor that a warp multiplies

// The elements of a warp's fragments, as PTX's "Matrix Fragments for mma.m16n8k16" gives them. A register of
// A or B holds two elements that are adjacent along the depth.
struct Element {
  int across, along;  // a row of A or D, or a column of B; and an index along the depth, or a column of D
};
inline Element element_of_a(int lane, int reg) {
  return {lane / 4 + 8 * (reg % 2), 2 * (lane % 4) + 8 * (reg / 2)};
}
inline Element element_of_b(int lane, int reg) { return {lane / 4, 2 * (lane % 4) + 8 * reg}; }
inline Element element_of_d(int lane, int reg) {
  return {lane / 4 + 8 * (reg / 2 % 2), 2 * (lane % 4) + reg % 2 + 8 * (reg / 4)};
}

// Returns sum + the product of two vectors of kDepth elements, as Ampere's tensor cores round it, which are
// the least exact since then (https://arxiv.org/abs/2511.10909).
float multiply_add(float sum, const double* a, const double* b);

// A matrix of 16-bit elements in shared memory, as wgmma's descriptors give it (PTX, "Matrix Descriptor
// Format" and "Canonical Layouts"). The element `across` is a row of A or a column of B.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, bool transposed);
  // The offset in shared memory of 16 bytes: 8 elements along the depth, or across it if the matrix is
  // transposed.
  uint64_t chunk(int across, int along) const;
  const bool transposed;

 private:
  const uint64_t start, leading, stride, width;  // bytes; the width is that of a swizzled row
};

}  // namespace ptx
