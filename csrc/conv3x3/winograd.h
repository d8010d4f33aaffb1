// The one-dimensional transforms of Winograd's F(M, 3), which computes M adjacent outputs of a filter of
// three taps with M + 2 multiplications (Lavin and Gray 2016). With d the M + 2 inputs and g the taps,
//   y = A^T [(G g) * (B^T d)],
// and applied to columns and then to rows, they give F(MxM, 3x3). The rows of the matrices belong to points
// at which polynomials are interpolated, and to infinity, which is the last row:
//   F(2, 3): 0, 1, -1.
//   F(4, 3): 0, 2/3, -2/3, 3/2, -3/2. Lavin and Gray's 0, 1, -1, 2, -2 have 2.2 times the error. The product
//   of the two magnitudes is one, which saves a multiplication.
// Every function takes and writes arrays of vectors of any type with +, -, *, `set` and `multiply_add`.
// Everything has internal linkage, because it is compiled once per instruction set.
#pragma once

#include "../common/vector.h"

namespace litevae {
namespace {

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  // B^T d
  template <class V>
  static __attribute__((always_inline)) inline void inputs(const V* d, V* to) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[3] - d[1];
  }
  // G g
  template <class V>
  static __attribute__((always_inline)) inline void taps(const V* g, V* to) {
    const V half = V::set(0.5f), even = half * (g[0] + g[2]), odd = half * g[1];
    to[0] = g[0], to[1] = even + odd, to[2] = even - odd, to[3] = g[2];
  }
  // A^T m
  template <class V>
  static __attribute__((always_inline)) inline void outputs(const V* m, V* to) {
    to[0] = m[0] + (m[1] + m[2]), to[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr double kA = 2.0 / 3, kB = 1.5;  // the magnitudes of the points
  static constexpr double kA2 = kA * kA, kB2 = kB * kB;
  // Lagrange's divisors 2 a^2 (a^2 - b^2) and 2 b^2 (b^2 - a^2), inverted
  static constexpr double kOfA = 0.5 / (kA2 * (kA2 - kB2)), kOfB = 0.5 / (kB2 * (kB2 - kA2));

  template <class V>
  static __attribute__((always_inline)) inline V constant(double value) {
    return V::set(static_cast<typename V::Scalar>(value));
  }
  // B^T d, where B^T is
  //   1  0  -(a2+b2)  0        1  0
  //   0 -b    -b2     a        1  0
  //   0  b    -b2    -a        1  0
  //   0 -a    -a2     b        1  0
  //   0  a    -a2    -b        1  0
  //   0  1     0     -(a2+b2)  0  1
  template <class V>
  static __attribute__((always_inline)) inline void inputs(const V* d, V* to) {
    const V a = constant<V>(kA), b = constant<V>(kB), sum = constant<V>(-kA2 - kB2);
    const V even_a = multiply_add(constant<V>(-kB2), d[2], d[4]);
    const V even_b = multiply_add(constant<V>(-kA2), d[2], d[4]);
    const V odd_a = multiply_add(constant<V>(-kB2), d[1], d[3]);
    const V odd_b = multiply_add(constant<V>(-kA2), d[1], d[3]);
    to[0] = multiply_add(sum, d[2], d[0] + d[4]);
    to[1] = multiply_add(a, odd_a, even_a), to[2] = multiply_add(constant<V>(-kA), odd_a, even_a);
    to[3] = multiply_add(b, odd_b, even_b), to[4] = multiply_add(constant<V>(-kB), odd_b, even_b);
    to[5] = multiply_add(sum, d[3], d[1] + d[5]);
  }
  // G g
  template <class V>
  static __attribute__((always_inline)) inline void taps(const V* g, V* to) {
    const V even_a = multiply_add(constant<V>(kOfA * kA2), g[2], constant<V>(kOfA) * g[0]);
    const V even_b = multiply_add(constant<V>(kOfB * kB2), g[2], constant<V>(kOfB) * g[0]);
    const V odd_a = constant<V>(kOfA * kA) * g[1], odd_b = constant<V>(kOfB * kB) * g[1];
    to[0] = g[0], to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = g[2];
  }
  // A^T m, whose columns are the powers 0 to 3 of the points
  template <class V>
  static __attribute__((always_inline)) inline void outputs(const V* m, V* to) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = (m[0] + even_a) + even_b;
    to[1] = multiply_add(constant<V>(kB), odd_b, constant<V>(kA) * odd_a);
    to[2] = multiply_add(constant<V>(kB2), even_b, constant<V>(kA2) * even_a);
    to[3] = multiply_add(constant<V>(kB * kB2), odd_b, multiply_add(constant<V>(kA * kA2), odd_a, m[5]));
  }
  // A e, the adjoint of `outputs`
  template <class V>
  static __attribute__((always_inline)) inline void outputs_adjoint(const V* e, V* to) {
    const V even_a = multiply_add(constant<V>(kA2), e[2], e[0]);
    const V even_b = multiply_add(constant<V>(kB2), e[2], e[0]);
    const V odd_a = multiply_add(constant<V>(kA * kA2), e[3], constant<V>(kA) * e[1]);
    const V odd_b = multiply_add(constant<V>(kB * kB2), e[3], constant<V>(kB) * e[1]);
    to[0] = e[0], to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = e[3];
  }
  // G^T m, the adjoint of `taps`
  template <class V>
  static __attribute__((always_inline)) inline void taps_adjoint(const V* m, V* to) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = multiply_add(constant<V>(kOfA), even_a, multiply_add(constant<V>(kOfB), even_b, m[0]));
    to[1] = multiply_add(constant<V>(kOfB * kB), odd_b, constant<V>(kOfA * kA) * odd_a);
    to[2] =
        multiply_add(constant<V>(kOfA * kA2), even_a, multiply_add(constant<V>(kOfB * kB2), even_b, m[5]));
  }
};

}  // namespace
}  // namespace litevae
