// Vectors of the type of the arithmetic, which load and store any element type: VecF (simd.h) for float, and
// for double plain arrays, which the compiler vectorises as well as it can.
#pragma once

#include <math.h>

#include "convert.h"
#include "simd.h"

namespace litevae {
namespace {

// Minimax polynomial of 2^f for 0 <= f <= 1, highest power first. Its relative error is 7.5e-8; half a unit
// in the last place is 6e-8.
constexpr int kDegree = 5;
constexpr float kExp2[] = {1.8775767e-3f, 8.9893400e-3f, 5.5826318e-2f,
                           2.4015362e-1f, 6.9315307e-1f, 9.9999993e-1f};

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
  static VecN load(const Stored* from, int lanes) {  // the other lanes become zero
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
  VecN operator/(VecN o) const {
    for (int i = 0; i < width; ++i) o.v[i] = v[i] / o.v[i];
    return o;
  }
};

template <class T>
inline VecN<T> multiply_add(VecN<T> a, VecN<T> b, VecN<T> c) {
  for (int i = 0; i < VecN<T>::width; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}

// Computes 1 + exp(-z), the divisor in SiLU(z), of U vectors. The vectors go through each step together,
// because each step waits for the one before.
template <int U>
__attribute__((always_inline)) inline void one_plus_exp_minus(const VecN<double>* z, VecN<double>* result) {
  for (int u = 0; u < U; ++u)
    for (int i = 0; i < VecN<double>::width; ++i) result[u].v[i] = 1.0 + ::exp(-z[u].v[i]);
}

inline VecF multiply_add(VecF a, VecF b, VecF c) { return VecF::multiply_add(a, b, c); }

template <int U>
__attribute__((always_inline)) inline void one_plus_exp_minus(const VecF* z, VecF* result) {
  VecF t[U], f[U], p[U];
  for (int u = 0; u < U; ++u) t[u] = z[u] * VecF::set(-1.44269504f);
  for (int u = 0; u < U; ++u) f[u] = t[u].fraction(), p[u] = VecF::set(kExp2[0]);
  for (int i = 1; i <= kDegree; ++i)
    for (int u = 0; u < U; ++u) p[u] = multiply_add(p[u], f[u], VecF::set(kExp2[i]));
  for (int u = 0; u < U; ++u) result[u] = VecF::set(1.0f) + p[u].times_power_of_two(t[u]);
}

template <class T>
struct VectorOf {
  using type = VecN<T>;
};
template <>
struct VectorOf<float> {
  using type = VecF;
};

}  // namespace
}  // namespace litevae
