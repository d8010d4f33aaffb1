// How a GPU thread moves vectors of stored elements to and from registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "tensor_view.h"

#define LITEVAE_DEVICE __device__ __forceinline__
#define LITEVAE_CONSTEXPR __host__ __device__ constexpr
#define LITEVAE_DEVICE_CALL static __device__ __noinline__

namespace litevae {
namespace {

// The widest access, at most 16 bytes, into which a run of `bytes` bytes can be cut. The run must be aligned
// to it.
LITEVAE_CONSTEXPR int64_t vector_bytes(int64_t bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

template <class To, class From>
LITEVAE_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Whether a kernel writes the memory that it reads. If it does not, loads take the read-only path, so that
// the compiler may move them ahead of stores.
enum class Memory { constant, written };

template <Memory kMemory, class Word>
LITEVAE_DEVICE Word load_word(const Word* from) {
  if constexpr (kMemory == Memory::constant)
    return __ldg(from);
  else
    return *from;
}

// Move kWords 32-bit words, aligned to kAlign bytes.
template <int kAlign, Memory kMemory = Memory::constant, int kWords>
LITEVAE_DEVICE void load_words(const void* from, uint32_t (&to)[kWords]) {
  if constexpr (kAlign == 16) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = load_word<kMemory>(static_cast<const uint4*>(from) + i);
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  } else if constexpr (kAlign == 8) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint2 v = load_word<kMemory>(static_cast<const uint2*>(from) + i);
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = load_word<kMemory>(static_cast<const uint32_t*>(from) + i);
  }
}

template <int kAlign, int kWords>
LITEVAE_DEVICE void store_words(void* to, const uint32_t (&from)[kWords]) {
  if constexpr (kAlign == 16) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i)
      static_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  } else if constexpr (kAlign == 8) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i)
      static_cast<uint2*>(to)[i] = make_uint2(from[2 * i], from[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) static_cast<uint32_t*>(to)[i] = from[i];
  }
}

template <Memory kMemory = Memory::constant>
LITEVAE_DEVICE uint16_t load_short(const void* from) {
  return load_word<kMemory>(static_cast<const unsigned short*>(from));
}

LITEVAE_DEVICE void store_short(void* to, uint16_t bits) {
  *static_cast<unsigned short*>(to) = bits;  // memcpy would store two bytes one by one
}

// Conversions between a stored element and a register. They are written in PTX because cuda_fp16.h and
// cuda_bf16.h cost seconds of compilation per architecture.
LITEVAE_DEVICE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
LITEVAE_DEVICE float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// One of the two 16-bit types, which is known at run time.
struct Either16 {
  uint16_t bits;
};
LITEVAE_DEVICE float widen(Either16 value, bool is_half) {
  const float half = widen(Half{value.bits}), bfloat16 = widen(BFloat16{value.bits});
  return is_half ? half : bfloat16;
}

// Rounds two values to nearest even, and packs the first into the low half.
template <class S>
LITEVAE_DEVICE uint32_t narrow(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same<S, Half>::value)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Converts the N elements of whole words.
template <class S, int N, int kWords, class T, class... IsHalf>
LITEVAE_DEVICE void unpack(const uint32_t (&words)[kWords], T (&to)[N], IsHalf... is_half) {
  static_assert(N * sizeof(S) == 4 * kWords, "");
  if constexpr (sizeof(S) == 8) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      to[i] = static_cast<T>(bit_cast<double>(static_cast<uint64_t>(words[2 * i + 1]) << 32 | words[2 * i]));
  } else if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<T>(bit_cast<float>(words[i]));
  } else if constexpr (std::is_same<S, BFloat16>::value) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      to[i] = static_cast<T>(bit_cast<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16);
      to[i] = static_cast<T>(widen(S{bits}, is_half...));
    }
  }
}

// Loads N adjacent elements; `from` must be aligned to vector_bytes(N * sizeof(S)).
template <class S, Memory kMemory = Memory::constant, int N, class T, class... IsHalf>
LITEVAE_DEVICE void load_vector(const void* from, T (&to)[N], IsHalf... is_half) {
  constexpr int kBytes = N * static_cast<int>(sizeof(S));
  if constexpr (kBytes % 4 != 0) {
    // An odd number of 16-bit elements.
#pragma unroll
    for (int i = 0; i < N; ++i)
      to[i] =
          static_cast<T>(widen(S{load_short<kMemory>(static_cast<const char*>(from) + 2 * i)}, is_half...));
  } else {
    uint32_t words[kBytes / 4];
    load_words<vector_bytes(kBytes), kMemory>(from, words);
    unpack<S>(words, to, is_half...);
  }
}

// Rounds N elements to the type S, for an even N if S has 16 bits.
template <class S, int N, class T, int kWords>
LITEVAE_DEVICE void pack(const T (&from)[N], uint32_t (&words)[kWords]) {
  static_assert(kWords * 4 == N * sizeof(S), "");
  if constexpr (sizeof(S) == 8) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint64_t bits = bit_cast<uint64_t>(static_cast<double>(from[i]));
      words[2 * i] = static_cast<uint32_t>(bits), words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  } else if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = bit_cast<uint32_t>(static_cast<float>(from[i]));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      words[i] = narrow<S>(static_cast<float>(from[2 * i]), static_cast<float>(from[2 * i + 1]));
  }
}

template <class S, int N, class T>
LITEVAE_DEVICE void store_vector(void* to, const T (&from)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(S));
  if constexpr (kBytes % 4 != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      store_short(static_cast<char*>(to) + 2 * i,
                  static_cast<uint16_t>(narrow<S>(static_cast<float>(from[i]), 0.f)));
    }
  } else {
    uint32_t words[kBytes / 4];
    pack<S>(from, words);
    store_words<vector_bytes(kBytes)>(to, words);
  }
}

// Moves all words down by kBy, where `move` says so.
template <int kBy, int kWords>
LITEVAE_DEVICE void shift_words(uint32_t (&words)[kWords], bool move) {
#pragma unroll
  for (int i = 0; i + kBy < kWords; ++i) words[i] = move ? words[i + kBy] : words[i];
}

// Moves all words down by 16 bits, where `move` says so.
template <int kWords>
LITEVAE_DEVICE void shift_halves(uint32_t (&words)[kWords], bool move) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t next = i + 1 < kWords ? words[i + 1] : 0;
    words[i] = move ? words[i] >> 16 | next << 16 : words[i];
  }
}

// Loads N adjacent elements of at most 32 bits, which are aligned as one element is. It reads whole vectors:
// up to 14 bytes before the elements and up to 16 bytes after them, if these are `readable`.
template <class S, int N, class T>
LITEVAE_DEVICE void load_unaligned(const char* from, bool readable, T (&to)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(S)), kVector = static_cast<int>(vector_bytes(kBytes));
  if constexpr (kVector >= 8) {
    if (readable) {
      constexpr int kWords = kBytes / 4, kMore = kVector / 4;
      const auto shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from)) & (kVector - 1);
      uint32_t first[kWords], last[kMore] = {}, all[kWords + kMore];
      load_words<kVector>(from - shift, first);
      if (shift != 0) load_words<kVector>(from - shift + kBytes, last);
#pragma unroll
      for (int i = 0; i < kWords + kMore; ++i) all[i] = i < kWords ? first[i] : last[i - kWords];
      if constexpr (kVector == 16) shift_words<2>(all, (shift & 8) != 0);
      shift_words<1>(all, (shift & 4) != 0);
      if constexpr (sizeof(S) == 2) shift_halves(all, (shift & 2) != 0);
#pragma unroll
      for (int i = 0; i < kWords; ++i) first[i] = all[i];
      unpack<S>(first, to);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T one[1];
    load_vector<S>(from + i * static_cast<int>(sizeof(S)), one);
    to[i] = one[0];
  }
}

// Where `move` says so, stores the first kCount words at `to`, and moves the others down and `to` up.
template <int kCount, int kWords>
LITEVAE_DEVICE void store_first(char*& to, uint32_t (&words)[kWords], int& left, bool move) {
  if constexpr (kCount <= kWords) {
    if (move) {
      uint32_t first[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) first[i] = words[i];
      store_words<4 * kCount>(to, first);
      to += 4 * kCount, left -= kCount;
    }
    shift_words<kCount>(words, move);
  }
}

// Stores N adjacent elements of at most 32 bits, which are aligned as one element is: single elements up to
// the first vector and after the last one.
template <class S, int N, class T>
LITEVAE_DEVICE void store_unaligned(char* to, const T (&from)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(S));
  if constexpr (kBytes < 8) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T one[1] = {from[i]};
      store_vector<S>(to + i * static_cast<int>(sizeof(S)), one);
    }
  } else {
    constexpr int kWords = kBytes / 4;
    uint32_t words[kWords];
    pack<S>(from, words);
    const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(to));
    int left = kWords;  // whole words between the first and the last 16 bits
    const bool halves = sizeof(S) == 2 && (address & 2) != 0;
    uint32_t last = 0;
    if (halves) {
      store_short(to, static_cast<uint16_t>(words[0]));
      last = words[kWords - 1] >> 16;
      shift_halves(words, true);
      to += 2, --left;
    }
    store_first<1>(to, words, left, (reinterpret_cast<uintptr_t>(to) & 4) != 0);
    store_first<2>(to, words, left, (reinterpret_cast<uintptr_t>(to) & 8) != 0 && left >= 2);
#pragma unroll
    for (int vector = 0; vector < kWords / 4; ++vector) store_first<4>(to, words, left, left >= 4);
    store_first<2>(to, words, left, left >= 2);
    store_first<1>(to, words, left, left >= 1);
    if (halves) store_short(to, static_cast<uint16_t>(last));
  }
}

}  // namespace
}  // namespace litevae
