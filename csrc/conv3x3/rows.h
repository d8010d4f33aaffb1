// Definitions that the convolution and the gradient of its weight share, above all the rows of pixels from
// which tiles are cut. Everything has internal linkage, because it is compiled once per instruction set. Only
// the set with the dot product of bfloat16 uses it.
#pragma once

#include <cstring>
#include <stdexcept>

#include "../common/buffer.h"
#include "../common/vector.h"
#include "conv3x3.h"

#if defined(__AVX512BF16__)
namespace litevae {
namespace {

struct Image {
  BFloat16* data;
  int64_t channels, n, row, pixel;

  explicit Image(const TensorView& t)
      : data(static_cast<BFloat16*>(t.data)),
        channels(t.size[1]),
        n(t.stride[0]),
        row(t.stride[2]),
        pixel(t.stride[3]) {
    if (data != nullptr && (t.dtype != DType::bf16 || (channels > 1 && t.stride[1] != 1)))
      throw std::invalid_argument("a 3x3 convolution's tensors must be bf16 with channels innermost");
  }
  BFloat16* at(int64_t image, int64_t y, int64_t x) const { return data + image * n + y * row + x * pixel; }

  // Prefetches one of `parts` parts of `count` pixels of a row.
  void prefetch(int64_t image, int64_t y, int64_t x, int64_t count, int64_t part, int64_t parts) const {
    if (data == nullptr) return;
    const int64_t elements = (count - 1) * pixel + channels;
    const BFloat16* from = at(image, y, x);
    for (int64_t i = elements * part / parts; i < elements * (part + 1) / parts; i += conv3x3::kRun)
      _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
  }
};

void copy_pixels(const BFloat16* from, int64_t step, int64_t count, int64_t channels, BFloat16* to,
                 int64_t to_step) {
  const int64_t whole = channels / conv3x3::kRun * conv3x3::kRun;
  const __mmask32 rest = static_cast<__mmask32>((1u << (channels - whole)) - 1);
  for (int64_t i = 0; i < count; ++i, from += step, to += to_step) {
    for (int64_t c = 0; c < whole; c += conv3x3::kRun)
      _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
    if (rest != 0) _mm512_mask_storeu_epi16(to + whole, rest, _mm512_maskz_loadu_epi16(rest, from + whole));
  }
}

void clear(BFloat16* to, int64_t count) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * 2);
}

// Copies the SiLU of pixels, which are normalised before if `norm` is not null. It holds three vectors of
// `padded` channels: means, factors and offsets.
void activate_pixels(const BFloat16* from, int64_t step, int64_t count, int64_t channels, const float* norm,
                     int64_t padded, BFloat16* to, int64_t to_step) {
  using conv3x3::kLanes;
  for (int64_t i = 0; i < count; ++i, from += step, to += to_step)
    for (int64_t c = 0; c < channels; c += 2 * kLanes) {
      VecF z[2], divisor[2];
      int lanes[2];
      for (int u = 0; u < 2; ++u) {
        const int64_t at = c + u * kLanes;
        lanes[u] = static_cast<int>(max_of(0, min_of(kLanes, channels - at)));
        z[u] = lanes[u] == kLanes ? VecF::load(from + at) : VecF::load(from + at, lanes[u]);
        if (norm != nullptr)
          z[u] = multiply_add(z[u] - VecF::load(norm + at), VecF::load(norm + padded + at),
                              VecF::load(norm + 2 * padded + at));
      }
      one_plus_exp_minus<2>(z, divisor);
      for (int u = 0; u < 2; ++u) {
        BFloat16* place = to + c + u * kLanes;
        lanes[u] == kLanes ? (z[u] / divisor[u]).store(place) : (z[u] / divisor[u]).store(place, lanes[u]);
      }
    }
}

// Interleaves the lanes of two vectors. The dot product multiplies such pairs and adds the products.
void store_pair(VecF first, VecF second, BFloat16* to) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

// Rows of pixels with a border of zeros, whose channels are padded with zeros.
struct Rows {
  int64_t height, width;  // without the border
  int64_t padded;         // channels
  int64_t elements;       // elements of one row

  Rows(const TensorView& t, int64_t channels, int64_t tile_columns)
      : height(t.size[2]),
        width(t.size[3]),
        padded(conv3x3::padded_inputs(channels)),
        elements((2 * tile_columns + 2) * padded) {}
};

// Fills one row, with zeros before and after the pixels, which `copy` writes. Padding channels must be zero
// already.
template <class Copy>
void fill_row(const Rows& s, int64_t y, BFloat16* to, Copy copy) {
  if (y < 0 || y >= s.height) return clear(to, s.elements);
  clear(to, s.padded);
  to += s.padded;
  copy(to);
  clear(to + s.width * s.padded, s.elements - (s.width + 1) * s.padded);
}

void fill_row(const Rows& s, const Image& x, int64_t n, int64_t y, BFloat16* to) {
  fill_row(s, y, to, [&](BFloat16* pixels) {
    copy_pixels(x.at(n, y, 0), x.pixel, s.width, x.channels, pixels, s.padded);
  });
}

}  // namespace
}  // namespace litevae
#endif
