// What a warp has under way: copies to shared memory (cp.async), and matrix products of a warp group (wgmma).
//
// A copy arrives, and a product writes its registers, as late as the program allows: when the thread waits
// for the group to which it was committed. Until then, its destination is NaN.
#pragma once

#include <array>
#include <deque>
#include <unordered_map>
#include <vector>

#include "tensor_core.h"

namespace ptx {

template <class T>
struct Groups {
  std::vector<T> open;  // not yet committed
  std::deque<std::vector<T>> committed;

  void commit() { committed.push_back(std::move(open)), open.clear(); }
  // Takes the oldest group if more than `most` are under way.
  bool take(uint64_t most, std::vector<T>& group) {
    if (committed.size() <= most) return false;
    group = std::move(committed.front()), committed.pop_front();
    return true;
  }
};

struct Copy {
  uint64_t address;  // in shared memory
  int bytes;
  std::array<uint8_t, 16> data;
};

// The rows of A, or the columns of B, that a warp reads from shared memory.
struct Factor {
  SharedMatrix matrix;
  int first, count;
};

struct Product {
  const Instruction* in;
  std::vector<Factor> factors;
  std::vector<std::vector<uint8_t>> loaded;  // the bytes of each factor
};

struct Products : Groups<Product> {
  std::unordered_map<int, Lanes> results;  // of registers that products under way will write
  std::vector<bool> written;               // registers, since the last wgmma.fence
  uint64_t history = 0;
};

}  // namespace ptx
