// Converts rows of stored elements to and from the type of the arithmetic. Everything has internal linkage,
// because it is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "tensor_view.h"

namespace litevae {
namespace {

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <>
constexpr DType dtype_of<Half>() {
  return DType::f16;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::bf16;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
// Rounds to nearest even; a NaN stays a NaN.
inline void from_float(float value, BFloat16& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

#if defined(__F16C__)
inline float to_float(Half value) { return _cvtsh_ss(value.bits); }
inline void from_float(float value, Half& to) {
  to.bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Multiplying by 2^112 moves the exponent of a half to that of a float, exactly, also for subnormals.
inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline void from_float(float value, Half& to) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u)
    half = 0x7e00u;
  else if (rest >= 0x477ff000u)  // rounds beyond the largest half, 65504
    half = 0x7c00u;
  else if (rest < 0x38800000u)  // a subnormal: adding 2^-1 leaves the rounded bits in the low mantissa
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  else
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  to.bits = static_cast<uint16_t>(sign | half);
}
#endif

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

template <class T>
inline void put(T value, float& to) {
  to = static_cast<float>(value);
}
template <class T>
inline void put(T value, double& to) {
  to = static_cast<double>(value);
}
template <class T>
inline void put(T value, Half& to) {
  from_float(static_cast<float>(value), to);
}
template <class T>
inline void put(T value, BFloat16& to) {
  from_float(static_cast<float>(value), to);
}

template <class Stored, class T>
void load_as(const char* from, int64_t pixel_stride, int64_t pixels, int64_t lanes, T* __restrict to) {
  const Stored* __restrict source = reinterpret_cast<const Stored*>(from);
  if (pixel_stride == lanes) {
    for (int64_t i = 0; i < pixels * lanes; ++i) to[i] = static_cast<T>(to_float(source[i]));
  } else if (lanes == 1) {
    for (int64_t x = 0; x < pixels; ++x) to[x] = static_cast<T>(to_float(source[x * pixel_stride]));
  } else {
    for (int64_t x = 0; x < pixels; ++x)
      for (int64_t k = 0; k < lanes; ++k)
        to[x * lanes + k] = static_cast<T>(to_float(source[x * pixel_stride + k]));
  }
}

template <class Stored, class T>
void store_as(const T* __restrict from, char* to, int64_t pixel_stride, int64_t pixels, int64_t lanes) {
  Stored* __restrict target = reinterpret_cast<Stored*>(to);
  if (pixel_stride == lanes) {
    for (int64_t i = 0; i < pixels * lanes; ++i) put(from[i], target[i]);
  } else if (lanes == 1) {
    for (int64_t x = 0; x < pixels; ++x) put(from[x], target[x * pixel_stride]);
  } else {
    for (int64_t x = 0; x < pixels; ++x)
      for (int64_t k = 0; k < lanes; ++k) put(from[x * lanes + k], target[x * pixel_stride + k]);
  }
}

// Loads a row of `pixels` groups of `lanes` adjacent elements, `pixel_stride` apart, as dense values of type
// T.
template <class T>
void load_row(DType dtype, const char* from, int64_t pixel_stride, int64_t pixels, int64_t lanes, T* to) {
  switch (dtype) {
    case DType::f32:
      return load_as<float>(from, pixel_stride, pixels, lanes, to);
    case DType::f64:
      return load_as<double>(from, pixel_stride, pixels, lanes, to);
    case DType::f16:
      return load_as<Half>(from, pixel_stride, pixels, lanes, to);
    case DType::bf16:
      return load_as<BFloat16>(from, pixel_stride, pixels, lanes, to);
  }
}

template <class T>
void store_row(DType dtype, const T* from, char* to, int64_t pixel_stride, int64_t pixels, int64_t lanes) {
  switch (dtype) {
    case DType::f32:
      return store_as<float>(from, to, pixel_stride, pixels, lanes);
    case DType::f64:
      return store_as<double>(from, to, pixel_stride, pixels, lanes);
    case DType::f16:
      return store_as<Half>(from, to, pixel_stride, pixels, lanes);
    case DType::bf16:
      return store_as<BFloat16>(from, to, pixel_stride, pixels, lanes);
  }
}

// Returns a channel of a parameter (1, C, 1, 1), or `missing` if there is no parameter.
inline double value(const TensorView& t, int64_t channel, double missing) {
  if (t.data == nullptr) return missing;
  double v;
  load_row(t.dtype, static_cast<const char*>(t.data) + channel * t.stride[1] * element_size(t.dtype), 1, 1, 1,
           &v);
  return v;
}

}  // namespace
}  // namespace litevae
