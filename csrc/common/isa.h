// One source, several instruction sets: every kernel file for the CPU is compiled once per instruction set,
// inside `namespace LITEVAE_ISA`. Calls go to the best set that this CPU runs.
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
  // older compilers have no name for F16C
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
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

// The set that calls go to. LITEVAE_CPU_ISA and the tests choose lower ones.
inline Isa current_isa = detect_isa();

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

#if defined(LITEVAE_X86)
#define LITEVAE_FOR_EACH_ISA(X, ...) \
  X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512bf16, __VA_ARGS__)
#else
#define LITEVAE_FOR_EACH_ISA(X, ...) X(baseline, __VA_ARGS__)
#endif
#define LITEVAE_DECLARE_FOR_ISA(ISA, FUNCTION, CALL) \
  namespace ISA {                                    \
  void FUNCTION(const CALL& call, int threads);      \
  }
#define LITEVAE_CALL_FOR_ISA(ISA, FUNCTION, CALL) \
  if (current_isa == Isa::ISA) return ISA::FUNCTION(call, threads);

// Declares FUNCTION(const CALL&, int threads) for each instruction set, and defines litevae::FUNCTION, which
// calls the one for the current set.
#define LITEVAE_DISPATCH_ISA(FUNCTION, CALL)                    \
  namespace litevae {                                           \
  LITEVAE_FOR_EACH_ISA(LITEVAE_DECLARE_FOR_ISA, FUNCTION, CALL) \
  inline void FUNCTION(const CALL& call, int threads) {         \
    LITEVAE_FOR_EACH_ISA(LITEVAE_CALL_FOR_ISA, FUNCTION, CALL)  \
  }                                                             \
  }
