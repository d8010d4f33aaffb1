// One source, several instruction sets: every *.cpp kernel file is compiled once a set inside
// `namespace LITEVAE_ISA`, and the best set that this CPU runs is picked at the first call.
#pragma once

#if defined(LITEVAE_X86)
#include <cpuid.h>
#endif

namespace litevae {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The best set whose every extension (as named in CMakeLists.txt) this CPU and its operating system offer.
inline Isa detect_isa() {
#if defined(LITEVAE_X86)
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;  // no name in older compilers
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 5) != 0;
    return bf16 ? Isa::avx512bf16 : Isa::avx512;
  }
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}

// Whether this CPU multiplies bfloat16 matrices in tiles (AMX), several times faster than in vectors, and the
// operating system lets it.
inline bool has_amx_bf16() {
#if defined(LITEVAE_X86)
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return false;
  unsigned enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  const unsigned tiles = 3u << 17;
  return (enabled & tiles) == tiles && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & 1u << 22) != 0;
#else
  return false;
#endif
}

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

}  // namespace litevae

// Declares FUNCTION once an instruction set, and defines the dispatching litevae::FUNCTION.
#if defined(LITEVAE_X86)
#define LITEVAE_DISPATCH_ISA(FUNCTION, SIGNATURE, ...)                    \
  namespace litevae {                                                     \
  namespace baseline {                                                    \
  void FUNCTION SIGNATURE;                                                \
  }                                                                       \
  namespace avx2 {                                                        \
  void FUNCTION SIGNATURE;                                                \
  }                                                                       \
  namespace avx512 {                                                      \
  void FUNCTION SIGNATURE;                                                \
  }                                                                       \
  namespace avx512bf16 {                                                  \
  void FUNCTION SIGNATURE;                                                \
  }                                                                       \
  inline void FUNCTION(Isa isa, LITEVAE_UNWRAP SIGNATURE) {               \
    if (isa == Isa::avx512bf16) return avx512bf16::FUNCTION(__VA_ARGS__); \
    if (isa == Isa::avx512) return avx512::FUNCTION(__VA_ARGS__);         \
    if (isa == Isa::avx2) return avx2::FUNCTION(__VA_ARGS__);             \
    baseline::FUNCTION(__VA_ARGS__);                                      \
  }                                                                       \
  }
#else
#define LITEVAE_DISPATCH_ISA(FUNCTION, SIGNATURE, ...)                                     \
  namespace litevae {                                                                      \
  namespace baseline {                                                                     \
  void FUNCTION SIGNATURE;                                                                 \
  }                                                                                        \
  inline void FUNCTION(Isa, LITEVAE_UNWRAP SIGNATURE) { baseline::FUNCTION(__VA_ARGS__); } \
  }
#endif
#define LITEVAE_UNWRAP(...) __VA_ARGS__
