// The coefficients of GroupNorm+SiLU's channels and their use, which its forward pass and the 3x3 convolution
// share. Internal linkage throughout: compiled once an instruction set.
#pragma once

#include "../common/vector.h"
#include "group_norm_silu.h"

namespace litevae {
namespace {

// A strip's vectors side by side, as a type, and whether all lanes of them count.
template <int U, bool W>
struct Width {
  static constexpr int value = U;
  static constexpr bool whole = W;
};

template <class V, bool Whole, class S>
V get(const S* from, int lanes) {
  return Whole ? V::load(from) : V::load(from, lanes);
}
template <bool Whole, class V, class S>
void set(V value, S* to, int lanes) {
  Whole ? value.store(to) : value.store(to, lanes);
}

// Coefficients of each channel. The mean is the sum of a number of type T and of what that lacks, so that x -
// mean keeps its digits at any mean.
enum ForwardRow { kMean, kFactor, kOffset, kForwardRows };

// One channel's entry of a (1, C, 1, 1) tensor, which may not be there.
inline double value(const TensorView& t, int64_t channel, double missing) {
  if (t.data == nullptr) return missing;
  double v;
  load_row(t.dtype, static_cast<const char*>(t.data) + channel * t.stride[1] * element_size(t.dtype), 1, 1, 1,
           &v);
  return v;
}

// One image's coefficients from the statistics of its groups.
template <class T>
void forward_table(const group_norm_silu::Inputs& in, int64_t n, T* table, int64_t stride) {
  const int64_t each = in.channels() / in.groups;
  for (int64_t c = 0; c < in.channels(); ++c) {
    const double* stats = in.stats + 2 * (n * in.groups + c / each);
    const T high = static_cast<T>(stats[0]);
    const double low = stats[0] - static_cast<double>(high), factor = stats[1] * value(in.weight, c, 1);
    table[kMean * stride + c] = high;
    table[kFactor * stride + c] = static_cast<T>(factor);
    table[kOffset * stride + c] = static_cast<T>(value(in.bias, c, 0) - low * factor);
  }
}

// `count` coefficients of each of the first `Rows` rows, from a channel on or, in every lane, of one channel.
template <class V, int U, int Rows>
void load_rows(const typename V::Scalar* table, int64_t channels, int64_t channel, bool one, V* rows) {
  for (int r = 0; r < Rows; ++r)
    for (int u = 0; u < U; ++u) {
      const typename V::Scalar* from = table + r * channels + channel;
      rows[r * U + u] = one ? V::set(*from) : V::load(from + u * V::width);
    }
}

template <class V, class W, class S>
void forward_strip(const S* x, int64_t x_step, S* y, int64_t y_step, int64_t count, int lanes,
                   const V* rows) {
  constexpr int U = W::value;
  V c[kForwardRows * U];
  for (int i = 0; i < kForwardRows * U; ++i) c[i] = rows[i];
  for (int64_t i = 0; i < count; ++i, x += x_step, y += y_step) {
    V z[U], divisor[U];
    for (int u = 0; u < U; ++u)
      z[u] = multiply_add(get<V, W::whole>(x + u * V::width, lanes) - c[kMean * U + u], c[kFactor * U + u],
                          c[kOffset * U + u]);
    one_plus_exp_minus<U>(z, divisor);
    for (int u = 0; u < U; ++u) set<W::whole>(z[u] / divisor[u], y + u * V::width, lanes);
  }
}

}  // namespace
}  // namespace litevae
