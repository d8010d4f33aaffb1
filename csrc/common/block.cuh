// Kernels whose threads work together, in phases that each end with a barrier.
#pragma once

#include <cmath>

#include "device.cuh"

namespace litevae {
namespace {

// The threads of a block.
struct Block {
  int threads;
  void* dynamic_shared;  // shared memory whose size is known at the launch

  template <class Phase>
  LITEVAE_DEVICE void each(const Phase& phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

// State that a thread keeps from phase to phase, in its registers.
template <class State>
struct Private {
  State state;
  LITEVAE_DEVICE explicit Private(const Block&) {}
  LITEVAE_DEVICE State& operator[](int) { return state; }
};

// Divides `rest` in place and returns the remainder. 64-bit division is slow and rarely needed.
LITEVAE_DEVICE int64_t take(int64_t& rest, int64_t by) {
  if (((rest | by) >> 32) == 0) {
    const uint32_t a = static_cast<uint32_t>(rest), b = static_cast<uint32_t>(by), quotient = a / b;
    rest = quotient;
    return a - quotient * b;
  }
  const int64_t quotient = rest / by, remainder = rest - quotient * by;
  rest = quotient;
  return remainder;
}

// This is a call, which keeps the long division out of the kernels that hardly ever need it.
struct Division {
  int64_t quotient, remainder;
};
LITEVAE_DEVICE_CALL Division divide_far(int64_t dividend, int64_t by) {
  const int64_t quotient = dividend / by;
  return {quotient, dividend - quotient * by};
}

// Division by a number that is known at the launch.
struct Divider {
  int64_t by;
  uint32_t magic;  // if it is 0, the division is a plain one

  // Returns a divider for dividends below `limit`.
  static Divider of(int64_t by, int64_t limit) {
    const bool fits = by > 1 && limit <= (int64_t{1} << 32) / by;
    return {by, fits ? static_cast<uint32_t>((int64_t{1} << 32) / by + 1) : 0};
  }
  // Divides `rest` in place and returns the remainder.
  LITEVAE_DEVICE int64_t take(int64_t& rest) const {
    if (magic == 0) {
      if (by == 1) return 0;
      const Division far = divide_far(rest, by);
      rest = far.quotient;
      return far.remainder;
    }
    const uint32_t dividend = static_cast<uint32_t>(rest), divisor = static_cast<uint32_t>(by);
    const uint32_t quotient = static_cast<uint32_t>(static_cast<uint64_t>(dividend) * magic >> 32);
    rest = quotient;
    return dividend - quotient * divisor;
  }
};

LITEVAE_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// A tensor as kernels take it. Strides are in bytes, so that addresses do not depend on the element type.
struct Strided {
  char* data;  // null if there is no tensor
  DType dtype;
  int64_t n, c, h, w;
};

inline Strided in_bytes(const TensorView& t) {
  const int64_t size = element_size(t.dtype);
  return {static_cast<char*>(t.data), t.dtype,           t.stride[0] * size, t.stride[1] * size,
          t.stride[2] * size,         t.stride[3] * size};
}

// Merges the rows of an image into one row, whose element i is i * w away from the first. Returns false if
// the rows are not evenly spaced.
inline bool flatten(Strided& t, int64_t height, int64_t width) {
  if (width == 1) t.w = t.h;
  return width == 1 || height == 1 || t.h == width * t.w;
}

// Loads and stores single elements of a type that is known at run time, so that one kernel serves all types.
template <class T, Memory kMemory = Memory::constant>
LITEVAE_DEVICE T load_one(const char* at, DType dtype) {
  T value[1] = {};
  if (dtype == DType::f32)
    load_vector<float, kMemory>(at, value);
  else if (dtype == DType::f64)
    load_vector<double, kMemory>(at, value);
  else
    load_vector<Either16, kMemory>(at, value, dtype == DType::f16);
  return value[0];
}

template <class T>
LITEVAE_DEVICE void store_one(char* at, DType dtype, T value) {
  const T run[1] = {value};
  if (dtype == DType::f32)
    store_vector<float>(at, run);
  else if (dtype == DType::f64)
    store_vector<double>(at, run);
  else if (dtype == DType::f16)
    store_vector<Half>(at, run);
  else
    store_vector<BFloat16>(at, run);
}

// Returns a value as it is when it is stored and loaded again.
template <class T>
LITEVAE_DEVICE T round_one(T value, DType dtype) {
  if (dtype == DType::f64) return value;
  const auto single = static_cast<float>(value);
  if (dtype == DType::f16)
    return static_cast<T>(widen(Half{static_cast<uint16_t>(narrow<Half>(single, 0.f))}));
  if (dtype == DType::bf16)
    return static_cast<T>(widen(BFloat16{static_cast<uint16_t>(narrow<BFloat16>(single, 0.f))}));
  return static_cast<T>(single);
}

// The threads of a block as a table: `rows` threads compute each of `columns` sums.
struct Table {
  int columns, rows;
  int column_stride, row_stride;  // in thread numbers

  LITEVAE_DEVICE static Table of(const Block& block, int64_t columns) {
    const int width = static_cast<int>(columns < block.threads ? columns : block.threads);
    return {width, block.threads / width, 1, width};
  }
  LITEVAE_DEVICE int column(int thread) const {
    return column_stride == 1 ? thread % columns : thread / column_stride;
  }
  LITEVAE_DEVICE int row(int thread) const { return row_stride == 1 ? thread % rows : thread / row_stride; }
  LITEVAE_DEVICE bool has(int thread) const { return thread < rows * columns; }
};

// Adds up the rows of kValues tables, always in the same order. `values` is indexed by [value][thread]. The
// sum of a value over a column becomes sums[value * columns + column]. kSums must be at least kValues *
// columns and at least the number of threads.
template <int kValues, int kThreads, int kSums, class T>
LITEVAE_DEVICE void add_rows(const Block& block, const Table& table, const T (&values)[kValues][kThreads],
                             T (&sums)[kSums]) {
  const int totals = kValues * table.columns;
  // There are two rounds, because one thread per total would leave most threads idle if the totals are few.
  int parts = block.threads / totals;
  parts = parts < 1 ? 1 : smaller(parts, 16);
  block.each([&](int thread) {
    for (int i = thread; i < totals * parts; i += block.threads) {
      const int total = i % totals, value = total / table.columns, column = total % table.columns;
      const T* const from = values[value] + column * table.column_stride;
      T sum = 0;
      for (int row = i / totals; row < table.rows; row += parts) sum += from[row * table.row_stride];
      sums[i] = sum;
    }
  });
  if (parts == 1) return;
  block.each([&](int thread) {
    for (int total = thread; total < totals; total += block.threads) {
      T sum = 0;
      for (int part = 0; part < parts; ++part) sum += sums[part * totals + total];
      sums[total] = sum;
    }
  });
}

}  // namespace
}  // namespace litevae
