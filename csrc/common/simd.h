// The few vector operations that the float kernels write out by hand, for the instruction set that the file
// is being compiled for. LITEVAE_SIMD is defined where there is one; scalar code serves the rest.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#define LITEVAE_SIMD 1

namespace litevae {
namespace {

#if defined(__AVX512F__)
struct VecF {
  static constexpr int width = 16;
  __m512 v;

  static VecF load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static VecF set(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void stream(float* to) const { _mm512_stream_ps(to, v); }  // past the cache; `to` aligned to 64 bytes
  VecF operator+(VecF o) const { return {_mm512_add_ps(v, o.v)}; }
  VecF operator-(VecF o) const { return {_mm512_sub_ps(v, o.v)}; }
  VecF operator*(VecF o) const { return {_mm512_mul_ps(v, o.v)}; }
};

// a b (2 x width adjacent values) -> those at even and at odd positions
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(a.v, e, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, _mm512_or_si512(e, _mm512_set1_epi32(1)), b.v);
}

inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a.v = _mm512_permutex2var_ps(even.v, lo, odd.v);
  b.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(lo, _mm512_set1_epi32(8)), odd.v);
}
#else
struct VecF {
  static constexpr int width = 8;
  __m256 v;

  static VecF load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static VecF set(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void stream(float* to) const { _mm256_stream_ps(to, v); }  // past the cache; `to` aligned to 32 bytes
  VecF operator+(VecF o) const { return {_mm256_add_ps(v, o.v)}; }
  VecF operator-(VecF o) const { return {_mm256_sub_ps(v, o.v)}; }
  VecF operator*(VecF o) const { return {_mm256_mul_ps(v, o.v)}; }
};

inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const __m256 lo = _mm256_permute2f128_ps(a.v, b.v, 0x20), hi = _mm256_permute2f128_ps(a.v, b.v, 0x31);
  even.v = _mm256_shuffle_ps(lo, hi, 0x88);
  odd.v = _mm256_shuffle_ps(lo, hi, 0xdd);
}

inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m256 lo = _mm256_unpacklo_ps(even.v, odd.v), hi = _mm256_unpackhi_ps(even.v, odd.v);
  a.v = _mm256_permute2f128_ps(lo, hi, 0x20);
  b.v = _mm256_permute2f128_ps(lo, hi, 0x31);
}
#endif

// Streamed stores must be visible before another thread is told that the work is done.
inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace litevae
#else
namespace litevae {
namespace {
inline void stream_fence() {}
}  // namespace
}  // namespace litevae
#endif
