// The few vector operations that the float kernels need, in the instruction set that the file is compiled
// for: AVX-512, AVX2, or any other set by the compiler's vector extension (SSE2, NEON).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "convert.h"

namespace litevae {
namespace {

#if defined(__AVX512F__)
struct VecF {
  using Scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static VecF load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static VecF load(const BFloat16* from) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static VecF load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  // Loads `lanes` elements; the other lanes become zero.
  static VecF load(const float* from, int lanes) { return {_mm512_maskz_loadu_ps(first(lanes), from)}; }
  static VecF load(const BFloat16* from, int lanes) {
    return widened(_mm256_maskz_loadu_epi16(first(lanes), from));
  }
  static VecF load(const Half* from, int lanes) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(lanes), from))};
  }
  static VecF set(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(BFloat16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bfloat16()); }
  void store(Half* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half()); }
  void store(float* to, int lanes) const { _mm512_mask_storeu_ps(to, first(lanes), v); }
  void store(BFloat16* to, int lanes) const { _mm256_mask_storeu_epi16(to, first(lanes), bfloat16()); }
  void store(Half* to, int lanes) const { _mm256_mask_storeu_epi16(to, first(lanes), half()); }
  void stream(float* to) const { _mm512_stream_ps(to, v); }  // past the cache; `to` aligned to 64 bytes
  VecF operator+(VecF o) const { return {_mm512_add_ps(v, o.v)}; }
  VecF operator-(VecF o) const { return {_mm512_sub_ps(v, o.v)}; }
  VecF operator*(VecF o) const { return {_mm512_mul_ps(v, o.v)}; }
  static VecF multiply_add(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  VecF operator/(VecF o) const { return {_mm512_div_ps(v, o.v)}; }
  VecF fraction() const { return {_mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
  VecF times_power_of_two(VecF t) const { return {_mm512_scalef_ps(v, t.v)}; }  // 2^floor(t)

 private:
  static __mmask16 first(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
  static VecF widened(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // Rounds to nearest even; a NaN stays a NaN.
  __m256i bfloat16() const {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                               _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

// Separates 2 x width adjacent values, in a and b, into those at even and those at odd positions.
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

// Transposes a matrix of `width` rows.
inline void transpose(VecF* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v),
                 d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // The 4x4 blocks are transposed; now transpose the matrix of blocks.
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, b, 0x88), r[i + 8].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(c, d, 0x88), r[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
#elif defined(__AVX2__)
struct VecF {
  using Scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static VecF load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static VecF load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static VecF load(const Half* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  // Loads `lanes` elements; the other lanes become zero.
  template <class Stored>
  static VecF load(const Stored* from, int lanes) {
    Stored buffer[width] = {};
    std::memcpy(buffer, from, static_cast<size_t>(lanes) * sizeof(Stored));
    return load(buffer);
  }
  static VecF set(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(BFloat16* to) const {  // round to nearest even; a NaN stays a NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class Stored>
  void store(Stored* to, int lanes) const {
    Stored buffer[width];
    store(buffer);
    std::memcpy(to, buffer, static_cast<size_t>(lanes) * sizeof(Stored));
  }
  void stream(float* to) const { _mm256_stream_ps(to, v); }  // past the cache; `to` aligned to 32 bytes
  VecF operator+(VecF o) const { return {_mm256_add_ps(v, o.v)}; }
  VecF operator-(VecF o) const { return {_mm256_sub_ps(v, o.v)}; }
  VecF operator*(VecF o) const { return {_mm256_mul_ps(v, o.v)}; }
  static VecF multiply_add(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  VecF operator/(VecF o) const { return {_mm256_div_ps(v, o.v)}; }
  VecF fraction() const {
    const VecF t = cut();
    return {_mm256_sub_ps(t.v, _mm256_floor_ps(t.v))};
  }
  VecF times_power_of_two(VecF t) const {  // 2^floor(t)
    const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(t.cut().v));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(v, _mm256_castsi256_ps(power))};
  }

 private:
  // Clamps to the exponents of normal numbers and of infinity. The order of the operands keeps a NaN.
  VecF cut() const {
    const __m256 below = _mm256_min_ps(_mm256_set1_ps(128.0f), v);
    return {_mm256_max_ps(_mm256_set1_ps(-126.0f), below)};
  }
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

// Transposes a matrix of `width` rows.
inline void transpose(VecF* r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v),
                 d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#else
struct VecF {
  using Scalar = float;
  static constexpr int width = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));  // the type of comparisons
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Shorts __attribute__((vector_size(8)));
  Floats v;

  static VecF load(const float* from) {
    VecF r;
    std::memcpy(&r.v, from, sizeof r.v);
    return r;
  }
  static VecF load(const BFloat16* from) { return {reinterpret_cast<Floats>(widened(from) << 16)}; }
  static VecF load(const Half* from) {  // as in convert.h
    const Bits bits = widened(from), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
    const Bits finite = reinterpret_cast<Bits>(reinterpret_cast<Floats>(rest << 13) * 0x1p112f);
    const Bits infinite = 0x7f800000 | (rest & 0x3ff) << 13;
    return {reinterpret_cast<Floats>(sign | chosen(rest >= 0x7c00, infinite, finite))};
  }
  // Loads `lanes` elements; the other lanes become zero.
  template <class Stored>
  static VecF load(const Stored* from, int lanes) {
    Stored buffer[width] = {};
    std::memcpy(buffer, from, static_cast<size_t>(lanes) * sizeof(Stored));
    return load(buffer);
  }
  static VecF set(float value) { return {Floats{value, value, value, value}}; }
  void store(float* to) const { std::memcpy(to, &v, sizeof v); }
  void store(BFloat16* to) const {  // round to nearest even; a NaN stays a NaN
    const Bits bits = reinterpret_cast<Bits>(v), odd = (bits >> 16) & 1;
    narrow(chosen(v != v, bits | 0x400000, bits + 0x7fff + odd) >> 16, to);
  }
  void store(Half* to) const {  // as in convert.h
    const Bits bits = reinterpret_cast<Bits>(v), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    const Bits normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Floats>(rest) + 0.5f) - 0x3f000000;
    const Bits infinite = Bits{} + 0x7c00, nan = Bits{} + 0x7e00;
    Bits half = chosen(rest < 0x38800000, subnormal, normal);
    half = chosen(rest >= 0x477ff000, chosen(rest > 0x7f800000, nan, infinite), half);
    narrow(sign | half, to);
  }
  template <class Stored>
  void store(Stored* to, int lanes) const {
    Stored buffer[width];
    store(buffer);
    std::memcpy(to, buffer, static_cast<size_t>(lanes) * sizeof(Stored));
  }
  void stream(float* to) const { store(to); }  // these sets have no such store, or none worth using
  VecF operator+(VecF o) const { return {v + o.v}; }
  VecF operator-(VecF o) const { return {v - o.v}; }
  VecF operator*(VecF o) const { return {v * o.v}; }
  static VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__aarch64__)
    return {reinterpret_cast<Floats>(vfmaq_f32(reinterpret_cast<float32x4_t>(c.v),
                                               reinterpret_cast<float32x4_t>(a.v),
                                               reinterpret_cast<float32x4_t>(b.v)))};
#else
    return {a.v * b.v + c.v};
#endif
  }
  VecF operator/(VecF o) const { return {v / o.v}; }
  VecF fraction() const {
    const Floats t = cut();
    return {t - whole(t)};
  }
  VecF times_power_of_two(VecF t) const {  // 2^floor(t)
    const Bits power = reinterpret_cast<Bits>(__builtin_convertvector(whole(t.cut()), Mask) + 127) << 23;
    return {v * reinterpret_cast<Floats>(power)};
  }

 private:
  static Bits chosen(Mask mask, Bits yes, Bits no) {
    const Bits m = reinterpret_cast<Bits>(mask);
    return (m & yes) | (~m & no);
  }
  template <class Stored>
  static Bits widened(const Stored* from) {
    Shorts bits;
    std::memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, Bits);
  }
  template <class Stored>
  static void narrow(Bits bits, Stored* to) {
    const Shorts low = __builtin_convertvector(bits, Shorts);
    std::memcpy(to, &low, sizeof low);
  }
  // Clamps to the exponents of normal numbers and of infinity, and keeps a NaN.
  Floats cut() const {
    const Bits low = reinterpret_cast<Bits>(Floats{} - 126.0f),
               high = reinterpret_cast<Bits>(Floats{} + 128.0f);
    const Bits below = chosen(v > 128.0f, high, reinterpret_cast<Bits>(v));
    return reinterpret_cast<Floats>(chosen(v < -126.0f, low, below));
  }
  // Rounds t - 1/2 to a whole number, which is floor(t), or for a whole t possibly t - 1. Adding 1.5 * 2^23
  // rounds.
  static Floats whole(Floats t) { return t - 0.5f + 12582912.0f - 12582912.0f; }
};

inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  // GCC has __builtin_shufflevector from version 12 on.
  even.v = VecF::Floats{a.v[0], a.v[2], b.v[0], b.v[2]};
  odd.v = VecF::Floats{a.v[1], a.v[3], b.v[1], b.v[3]};
}

inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  a.v = VecF::Floats{even.v[0], odd.v[0], even.v[1], odd.v[1]};
  b.v = VecF::Floats{even.v[2], odd.v[2], even.v[3], odd.v[3]};
}

// Transposes a matrix of `width` rows.
inline void transpose(VecF* r) {
  VecF a, b, c, d;
  interleave(r[0], r[2], a, b), interleave(r[1], r[3], c, d);
  interleave(a, c, r[0], r[1]), interleave(b, d, r[2], r[3]);
}
#endif

// Streamed stores must be visible before another thread learns that the work is done.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace litevae
