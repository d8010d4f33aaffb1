#include "arithmetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace ptx {
namespace {

// --- Bits and numbers.

int64_t extend(uint64_t value, Type type) {
  const int unused = 64 - 8 * size_of(type);
  return static_cast<int64_t>(value << unused) >> unused;
}

float half_to_float(uint64_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                 fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

// Rounds to nearest even from the exact value, so that a double is rounded once.
uint64_t to_half(double value) {
  if (std::isnan(value)) return 0x7fff;
  const uint64_t sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  if (value >= 65520.) return sign | 0x7c00;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  const int unit = std::max(exponent - 11, -24);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  if (rounded < 0x1p-14) return sign | static_cast<uint64_t>(std::ldexp(rounded, 24));
  std::frexp(rounded, &exponent);
  const uint64_t fraction = static_cast<uint64_t>(std::ldexp(rounded, 11 - exponent)) & 1023;
  return sign | static_cast<uint64_t>(exponent + 14) << 10 | fraction;
}

float bfloat_to_float(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint64_t to_bfloat(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  static float number(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
  static uint64_t of(float number) { return std::bit_cast<uint32_t>(number); }
};
template <>
struct Bits<double> {
  static double number(uint64_t bits) { return std::bit_cast<double>(bits); }
  static uint64_t of(double number) { return std::bit_cast<uint64_t>(number); }
};

template <class T>
T flushed(T value) {
  return std::fabs(value) < std::numeric_limits<T>::min() ? std::copysign(T(0), value) : value;
}

}  // namespace

double number_of(uint64_t bits, Type type) {
  switch (type) {
    case Type::f16:
      return half_to_float(bits);
    case Type::bf16:
      return bfloat_to_float(bits);
    case Type::f32:
      return Bits<float>::number(bits);
    default:
      return Bits<double>::number(bits);
  }
}

namespace {

template <class F>
void each(Lanes& out, const F& value) {
  for (int lane = 0; lane < kWarp; ++lane) out[lane] = value(lane);
}

// --- Floating point.

template <class T>
void float_arithmetic(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  using B = Bits<T>;
  const auto finish = [&](T value) {
    if (in.flush) value = flushed(value);
    if (in.saturate) value = std::fmin(std::fmax(value, T(0)), T(1));
    return B::of(value);
  };
  // The last source has the type of the result; those before it may be narrower.
  const bool is_mixed = in.source_type == Type::f16 || in.source_type == Type::bf16;
  const auto source = [&](size_t i, int lane) {
    const T value = is_mixed && i + 1 < in.from.size()
                        ? static_cast<T>(number_of(from[i][lane], in.source_type))
                        : B::number(from[i][lane]);
    return in.flush ? flushed(value) : value;
  };
  const auto unary = [&](auto f) { each(out, [&](int l) { return finish(f(source(0, l))); }); };
  const auto binary = [&](auto f) {
    each(out, [&](int l) { return finish(f(source(0, l), source(1, l))); });
  };
  const auto extreme = [&](auto f) {
    binary([&](T a, T b) {
      const bool nan = std::isnan(a) || std::isnan(b);
      return in.propagate_nan && nan ? std::numeric_limits<T>::quiet_NaN() : f(a, b);
    });
  };
  switch (in.op) {
    case Op::add:
      return binary([](T a, T b) { return a + b; });
    case Op::sub:
      return binary([](T a, T b) { return a - b; });
    case Op::mul:
      return binary([](T a, T b) { return a * b; });
    case Op::div:
      return binary([](T a, T b) { return a / b; });
    case Op::min:
      return extreme([](T a, T b) { return std::fmin(a, b); });
    case Op::max:
      return extreme([](T a, T b) { return std::fmax(a, b); });
    case Op::mad:
    case Op::fma:
      return each(out, [&](int l) { return finish(std::fma(source(0, l), source(1, l), source(2, l))); });
    case Op::neg:
      return unary([](T a) { return -a; });
    case Op::abs:
      return unary([](T a) { return std::fabs(a); });
    case Op::ex2:
      return unary([](T a) { return std::exp2(a); });
    case Op::lg2:
      return unary([](T a) { return std::log2(a); });
    case Op::rcp:
      return unary([](T a) { return 1 / a; });
    case Op::sqrt:
      return unary([](T a) { return std::sqrt(a); });
    case Op::rsqrt:
      return unary([](T a) { return 1 / std::sqrt(a); });
    default:
      fail("line " + std::to_string(in.line) + ": not an instruction of floating-point numbers");
  }
}

// Two numbers in each register.
void paired_arithmetic(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  out.fill(0);
  for (const int shift : {0, 32}) {
    Lanes halves[3], results;
    const uint64_t* sources[3] = {};
    for (size_t i = 0; i < in.from.size(); ++i) {
      each(halves[i], [&](int l) { return from[i][l] >> shift & 0xffffffff; });
      sources[i] = halves[i].data();
    }
    float_arithmetic<float>(in, sources, results);
    each(out, [&](int l) { return out[l] | results[l] << shift; });
  }
}

void half_arithmetic(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  const uint64_t sign = 0x8000;
  if (in.op == Op::neg) return each(out, [&](int l) { return cut(from[0][l], Type::b16) ^ sign; });
  if (in.op == Op::abs) return each(out, [&](int l) { return cut(from[0][l], Type::b16) & ~sign; });
  fail("line " + std::to_string(in.line) + ": the emulator has no arithmetic of 16-bit floats");
}

// --- Integers.

uint64_t high_product(uint64_t a, uint64_t b, Type type) {
  const int bits = 8 * size_of(type);
  if (is_signed(type)) {
    const __int128 product = static_cast<__int128>(extend(a, type)) * extend(b, type);
    return static_cast<uint64_t>(product >> bits);
  }
  const unsigned __int128 product = static_cast<unsigned __int128>(cut(a, type)) * cut(b, type);
  return static_cast<uint64_t>(product >> bits);
}

// The product before it is cut to the type of the result.
uint64_t product(const Instruction& in, uint64_t a, uint64_t b) {
  if (in.high) return high_product(a, b, in.type);
  if (!in.wide) return a * b;
  return is_signed(in.type) ? static_cast<uint64_t>(extend(a, in.type) * extend(b, in.type))
                            : cut(a, in.type) * cut(b, in.type);
}

// A division by zero gives all ones, as on a GPU, and the smallest number by -1 must not trap.
uint64_t quotient(uint64_t a, uint64_t b, Type type) {
  if (cut(b, type) == 0) return ~uint64_t{0};
  if (!is_signed(type)) return cut(a, type) / cut(b, type);
  const int64_t by = extend(b, type);
  return by == -1 ? -a : static_cast<uint64_t>(extend(a, type) / by);
}

bool less(uint64_t a, uint64_t b, Type type) {
  return is_signed(type) ? extend(a, type) < extend(b, type) : cut(a, type) < cut(b, type);
}

uint64_t shifted_left(uint64_t a, uint64_t by, Type type) {
  by = cut(by, Type::u32);
  return by >= 8u * size_of(type) ? 0 : a << by;
}

uint64_t shifted_right(uint64_t a, uint64_t by, Type type) {
  const uint64_t bits = 8u * size_of(type);
  by = cut(by, Type::u32);
  if (is_signed(type)) return static_cast<uint64_t>(extend(a, type) >> std::min(by, bits - 1));
  return by >= bits ? 0 : cut(a, type) >> by;
}

uint64_t inserted(uint64_t a, uint64_t b, uint64_t position, uint64_t length, Type type) {
  const uint64_t bits = 8u * size_of(type);
  position &= 255, length &= 255;
  if (position >= bits) return b;
  length = std::min(length, bits - position);
  const uint64_t mask = length >= 64 ? ~uint64_t{0} : ((uint64_t{1} << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}

uint64_t extracted(uint64_t a, uint64_t position, uint64_t length, Type type) {
  const uint64_t bits = 8u * size_of(type);
  position &= 255, length &= 255;
  if (length == 0 || position >= bits) return 0;
  length = std::min(length, bits - position);
  const uint64_t mask = length >= 64 ? ~uint64_t{0} : (uint64_t{1} << length) - 1;
  const uint64_t value = cut(a, type) >> position & mask;
  return is_signed(type) && (value >> (length - 1) & 1) != 0 ? value | ~mask : value;
}

uint64_t permuted(uint64_t a, uint64_t b, uint64_t control) {
  const uint64_t bytes = cut(a, Type::u32) | b << 32;
  uint64_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t selector = control >> 4 * i & 15;
    uint64_t byte = bytes >> 8 * (selector & 7) & 255;
    if ((selector & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;  // replicates the sign
    out |= byte << 8 * i;
  }
  return out;
}

uint64_t funnel_shifted(const Instruction& in, uint64_t low, uint64_t high, uint64_t by) {
  const uint64_t both = cut(low, Type::u32) | high << 32;
  by = cut(by, Type::u32);
  by = in.clamp ? std::min(by, uint64_t{32}) : by & 31;
  return in.left ? (both << by) >> 32 : both >> by;
}

uint64_t looked_up(uint64_t a, uint64_t b, uint64_t c, uint64_t table) {
  uint64_t out = 0;
  for (int bit = 0; bit < 8; ++bit) {
    if ((table >> bit & 1) == 0) continue;
    out |= ((bit & 4) != 0 ? a : ~a) & ((bit & 2) != 0 ? b : ~b) & ((bit & 1) != 0 ? c : ~c);
  }
  return out;
}

uint64_t reversed(uint64_t a, Type type) {
  const int bits = 8 * size_of(type);
  uint64_t out = 0;
  for (int i = 0; i < bits; ++i) out |= (a >> i & 1) << (bits - 1 - i);
  return out;
}

void integer_arithmetic(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  const Type type = in.type;
  const bool widens = in.wide && (in.op == Op::mul || in.op == Op::mad);
  const Type result = !widens ? type : size_of(type) == 4 ? Type::b64 : Type::b32;
  const auto unary = [&](auto f) { each(out, [&](int l) { return cut(f(from[0][l]), result); }); };
  const auto binary = [&](auto f) {
    each(out, [&](int l) { return cut(f(from[0][l], from[1][l]), result); });
  };
  const auto ternary = [&](auto f) {
    each(out, [&](int l) { return cut(f(from[0][l], from[1][l], from[2][l]), result); });
  };
  using u = uint64_t;
  switch (in.op) {
    case Op::add:
      return binary([](u a, u b) { return a + b; });
    case Op::sub:
      return binary([](u a, u b) { return a - b; });
    case Op::mul:
      return binary([&](u a, u b) { return product(in, a, b); });
    case Op::mad:
      return ternary([&](u a, u b, u c) { return product(in, a, b) + c; });
    case Op::div:
      return binary([&](u a, u b) { return quotient(a, b, type); });
    case Op::rem:
      return binary([&](u a, u b) { return cut(b, type) == 0 ? a : a - quotient(a, b, type) * b; });
    case Op::min:
      return binary([&](u a, u b) { return less(b, a, type) ? b : a; });
    case Op::max:
      return binary([&](u a, u b) { return less(a, b, type) ? b : a; });
    case Op::neg:
      return unary([](u a) { return -a; });
    case Op::abs:
      return unary([&](u a) { return extend(a, type) < 0 ? -a : a; });
    case Op::and_:
      return binary([](u a, u b) { return a & b; });
    case Op::or_:
      return binary([](u a, u b) { return a | b; });
    case Op::xor_:
      return binary([](u a, u b) { return a ^ b; });
    case Op::not_:
      return unary([](u a) { return ~a; });
    case Op::shl:
      return binary([&](u a, u b) { return shifted_left(a, b, type); });
    case Op::shr:
      return binary([&](u a, u b) { return shifted_right(a, b, type); });
    case Op::bfi:
      return each(out, [&](int l) {
        return cut(inserted(from[0][l], from[1][l], from[2][l], from[3][l], type), type);
      });
    case Op::bfe:
      return ternary([&](u a, u b, u c) { return extracted(a, b, c, type); });
    case Op::prmt:
      return ternary([](u a, u b, u c) { return permuted(a, b, c); });
    case Op::shf:
      return ternary([&](u a, u b, u c) { return funnel_shifted(in, a, b, c); });
    case Op::lop3:
      return each(
          out, [&](int l) { return cut(looked_up(from[0][l], from[1][l], from[2][l], from[3][l]), type); });
    case Op::popc:
      return unary([&](u a) { return static_cast<u>(std::popcount(cut(a, type))); });
    case Op::clz:
      return unary(
          [&](u a) { return static_cast<u>(std::countl_zero(cut(a, type)) - (64 - 8 * size_of(type))); });
    case Op::brev:
      return unary([&](u a) { return reversed(a, type); });
    default:
      fail("line " + std::to_string(in.line) + ": not an instruction of integers");
  }
}

void predicate_arithmetic(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  each(out, [&](int l) -> uint64_t {
    const uint64_t a = from[0][l], b = in.op == Op::not_ ? 0 : from[1][l];
    const uint64_t all = in.op == Op::and_   ? a & b
                         : in.op == Op::or_  ? a | b
                         : in.op == Op::xor_ ? a ^ b
                                             : ~a;
    return all & 1;
  });
}

// --- Comparisons and conversions.

bool compare_floats(Comparison comparison, double a, double b) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  switch (comparison) {
    case Comparison::eq:
      return a == b;
    case Comparison::ne:
      return !unordered && a != b;
    case Comparison::lt:
      return a < b;
    case Comparison::le:
      return a <= b;
    case Comparison::gt:
      return a > b;
    case Comparison::ge:
      return a >= b;
    case Comparison::equ:
      return unordered || a == b;
    case Comparison::neu:
      return unordered || a != b;
    case Comparison::ltu:
      return unordered || a < b;
    case Comparison::leu:
      return unordered || a <= b;
    case Comparison::gtu:
      return unordered || a > b;
    case Comparison::geu:
      return unordered || a >= b;
    case Comparison::num:
      return !unordered;
    case Comparison::nan:
      return unordered;
    default:
      fail("a comparison of integers with floating-point operands");
  }
}

bool compare_integers(Comparison comparison, uint64_t a, uint64_t b, Type type) {
  const uint64_t x = cut(a, type), y = cut(b, type);
  switch (comparison) {
    case Comparison::eq:
      return x == y;
    case Comparison::ne:
      return x != y;
    case Comparison::lt:
      return less(a, b, type);
    case Comparison::le:
      return !less(b, a, type);
    case Comparison::gt:
      return less(b, a, type);
    case Comparison::ge:
      return !less(a, b, type);
    case Comparison::lo:
      return x < y;
    case Comparison::ls:
      return x <= y;
    case Comparison::hi:
      return x > y;
    case Comparison::hs:
      return x >= y;
    default:
      fail("a comparison of floating-point numbers with integer operands");
  }
}

void set_predicates(const Instruction& in, const uint64_t* const* from, Lanes& out, Lanes& second) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t a = from[0][lane], b = from[1][lane];
    const bool result = is_float(in.type)
                            ? compare_floats(in.comparison, number_of(a, in.type), number_of(b, in.type))
                            : compare_integers(in.comparison, a, b, in.type);
    const bool other = in.logic != Logic::none && (from[2][lane] & 1) != 0;
    const auto combined = [&](bool value) {
      switch (in.logic) {
        case Logic::and_:
          return value && other;
        case Logic::or_:
          return value || other;
        case Logic::xor_:
          return value != other;
        default:
          return value;
      }
    };
    out[lane] = combined(result), second[lane] = combined(!result);
  }
}

// Towards zero; what is beyond the type becomes its largest or smallest number, and NaN becomes zero.
uint64_t float_to_integer(double value, Type type) {
  if (std::isnan(value)) return 0;
  const int bits = 8 * size_of(type);
  const double end = std::ldexp(1., is_signed(type) ? bits - 1 : bits), first = is_signed(type) ? -end : 0;
  if (value >= end) return is_signed(type) ? (uint64_t{1} << (bits - 1)) - 1 : ~uint64_t{0};
  if (is_signed(type)) return static_cast<uint64_t>(static_cast<int64_t>(std::max(value, first)));
  return static_cast<uint64_t>(std::max(value, first));
}

uint64_t to_float_type(double value, Type type) {
  switch (type) {
    case Type::f16:
      return to_half(value);
    case Type::bf16:
      return to_bfloat(static_cast<float>(value));
    case Type::f32:
      return Bits<float>::of(static_cast<float>(value));
    default:
      return Bits<double>::of(value);
  }
}

uint64_t converted(const Instruction& in, uint64_t bits) {
  const Type to = in.type, from = in.source_type;
  if (is_float(from)) {
    const double value = number_of(bits, from);
    return is_float(to) ? to_float_type(value, to) : cut(float_to_integer(value, to), to);
  }
  if (!is_float(to))
    return cut(is_signed(from) ? static_cast<uint64_t>(extend(bits, from)) : cut(bits, from), to);
  if (to == Type::f32) {  // once, not through double
    const float value =
        is_signed(from) ? static_cast<float>(extend(bits, from)) : static_cast<float>(cut(bits, from));
    return Bits<float>::of(value);
  }
  const double value =
      is_signed(from) ? static_cast<double>(extend(bits, from)) : static_cast<double>(cut(bits, from));
  return to_float_type(value, to);
}

void convert(const Instruction& in, const uint64_t* const* from, Lanes& out) {
  if (in.source_type == Type::f64 && in.type == Type::bf16) fail("a conversion that would round twice");
  const auto packed = [&](auto narrow) {
    each(out, [&](int l) {
      return narrow(Bits<float>::number(from[0][l])) << 16 | narrow(Bits<float>::number(from[1][l]));
    });
  };
  if (in.type == Type::f16x2) return packed([](float x) { return to_half(x); });
  if (in.type == Type::bf16x2) return packed([](float x) { return to_bfloat(x); });
  const bool widens = in.source_type == Type::f16 && in.type == Type::f32;  // frequent
  if (widens) return each(out, [&](int l) { return Bits<float>::of(half_to_float(from[0][l])); });
  each(out, [&](int l) { return converted(in, from[0][l]); });
}

}  // namespace

void compute(const Instruction& in, const uint64_t* const* from, Lanes& out, Lanes& second) {
  if (in.op == Op::setp) return set_predicates(in, from, out, second);
  if (in.op == Op::cvt) return convert(in, from, out);
  if (in.op == Op::selp)
    return each(out, [&](int l) { return (from[2][l] & 1) != 0 ? from[0][l] : from[1][l]; });
  switch (in.type) {
    case Type::f32:
      return float_arithmetic<float>(in, from, out);
    case Type::f64:
      return float_arithmetic<double>(in, from, out);
    case Type::f32x2:
      return paired_arithmetic(in, from, out);
    case Type::f16:
    case Type::bf16:
    case Type::f16x2:
    case Type::bf16x2:
      return half_arithmetic(in, from, out);
    case Type::pred:
      return predicate_arithmetic(in, from, out);
    default:
      return integer_arithmetic(in, from, out);
  }
}

}  // namespace ptx
