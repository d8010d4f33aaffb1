// Vectors of the type that the arithmetic runs in, loaded from and stored to any element type: VecF (simd.h)
// where the instruction set has one, and plain arrays, which the compiler vectorises as it can, for the rest.
#pragma once

#include <math.h>

#include "convert.h"
#include "simd.h"

namespace litevae {
namespace {

// 2^f for |f| <= 1/2, highest power first: minimax, relative error 7.5e-8 (half a unit in the last place is
// 6e-8).
constexpr int kDegree = 5;
constexpr float kExp2[] = {1.3276472e-3f, 9.6755419e-3f, 5.5507131e-2f,
                           2.4022120e-1f, 6.9314694e-1f, 1.0000001f};

template <class T>
struct VecN {
  using Scalar = T;
  static constexpr int width = 8;
  T v[width];

  static VecN set(T value) {
    VecN r;
    for (int i = 0; i < width; ++i) r.v[i] = value;
    return r;
  }
  template <class Stored>
  static VecN load(const Stored* from) {
    VecN r;
    for (int i = 0; i < width; ++i) r.v[i] = static_cast<T>(to_float(from[i]));
    return r;
  }
  template <class Stored>
  static VecN load(const Stored* from, int lanes) {  // the other lanes are zero
    VecN r = set(0);
    for (int i = 0; i < lanes; ++i) r.v[i] = static_cast<T>(to_float(from[i]));
    return r;
  }
  template <class Stored>
  void store(Stored* to) const {
    for (int i = 0; i < width; ++i) put(v[i], to[i]);
  }
  template <class Stored>
  void store(Stored* to, int lanes) const {
    for (int i = 0; i < lanes; ++i) put(v[i], to[i]);
  }
  VecN operator+(VecN o) const {
    for (int i = 0; i < width; ++i) o.v[i] = v[i] + o.v[i];
    return o;
  }
  VecN operator-(VecN o) const {
    for (int i = 0; i < width; ++i) o.v[i] = v[i] - o.v[i];
    return o;
  }
  VecN operator*(VecN o) const {
    for (int i = 0; i < width; ++i) o.v[i] = v[i] * o.v[i];
    return o;
  }
};

template <class T>
inline VecN<T> multiply_add(VecN<T> a, VecN<T> b, VecN<T> c) {
  for (int i = 0; i < VecN<T>::width; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}

// 1 / (1 + exp(-z)); the exponent is cut where the result is zero all the same.
inline VecN<double> sigmoid(VecN<double> z) {
  for (double& x : z.v) x = 1.0 / (1.0 + ::exp(-x));
  return z;
}
inline VecN<float> sigmoid(VecN<float> z) {
  for (float& x : z.v) {
    const float t = x * -1.44269504f, cut = t > 126.0f ? 126.0f : t < -126.0f ? -126.0f : t;
    const float n = cut + 12582912.0f - 12582912.0f, f = cut - n;  // 1.5 * 2^23: rounds to whole numbers
    float p = kExp2[0];
    for (int i = 1; i <= kDegree; ++i) p = p * f + kExp2[i];
    x = 1.0f / (1.0f + p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
  }
  return z;
}

#if defined(LITEVAE_SIMD)
inline VecF multiply_add(VecF a, VecF b, VecF c) { return VecF::multiply_add(a, b, c); }

inline VecF sigmoid(VecF z) {
  // at most 2^126, so that the reciprocal neither overflows nor underflows; in this order a NaN stays
  const VecF t = min(VecF::set(126.0f), z * VecF::set(-1.44269504f)), n = t.rounded(), f = t - n;
  VecF p = VecF::set(kExp2[0]);
  for (int i = 1; i <= kDegree; ++i) p = multiply_add(p, f, VecF::set(kExp2[i]));
  return reciprocal(VecF::set(1.0f) + p.times_power_of_two(n));
}

using VecFloat = VecF;
#else
using VecFloat = VecN<float>;
#endif

template <class T>
struct VectorOf {
  using type = VecN<T>;
};
template <>
struct VectorOf<float> {
  using type = VecFloat;
};

}  // namespace
}  // namespace litevae
