// The last pass of the gradients of a 3x3 convolution's weight. Everything has internal linkage, because it
// is compiled once per instruction set.
#pragma once

#include "../common/parallel.h"
#include "../common/vector.h"

namespace litevae {
namespace {

// Stores a weight (O, I, 3, 3) of any dtype and strides. finish(output, taps) computes the taps of one output
// channel, (9, width). `buffers` holds 9 * width floats per thread.
template <class Finish>
void store_weight(const TensorView& w, int64_t width, float* buffers, int threads, const Finish& finish) {
  parallel_for(threads, threads, [&](int64_t from, int64_t to) {
    for (int64_t thread = from; thread < to; ++thread) {
      float* taps = buffers + thread * 9 * width;
      for (int64_t o = w.size[0] * thread / threads; o < w.size[0] * (thread + 1) / threads; ++o) {
        finish(o, taps);
        for (int64_t k = 0; k < 9; ++k) {
          const int64_t at = o * w.stride[0] + k / 3 * w.stride[2] + k % 3 * w.stride[3];
          store_row(w.dtype, taps + k * width, static_cast<char*>(w.data) + at * element_size(w.dtype),
                    w.stride[1], w.size[1], 1);
        }
      }
    }
  });
}

}  // namespace
}  // namespace litevae
