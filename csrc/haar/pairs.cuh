// How two neighbouring threads move runs of adjacent elements, one run each. If each thread moved the vectors
// of its own run, an instruction would access one vector per sector of global memory, which is half of the
// sector or less. So both move the vectors of one sector together, and exchange them by shuffles.
#pragma once

#include "../common/device.cuh"

namespace litevae {
namespace haar {
namespace {

constexpr int kThreads = 128;  // of a block
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// PTX, because the compiler does not know that an address from another thread is one of global memory.
LITEVAE_DEVICE void store_global(size_t to, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
LITEVAE_DEVICE void store_global(size_t to, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
LITEVAE_DEVICE void store_global(size_t to, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
LITEVAE_DEVICE void store_global(size_t to, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory");
}

LITEVAE_DEVICE uint4 exchange(const uint4& v) {
  return {__shfl_xor_sync(kWholeWarp, v.x, 1), __shfl_xor_sync(kWholeWarp, v.y, 1),
          __shfl_xor_sync(kWholeWarp, v.z, 1), __shfl_xor_sync(kWholeWarp, v.w, 1)};
}
LITEVAE_DEVICE uint2 exchange(const uint2& v) {
  return {__shfl_xor_sync(kWholeWarp, v.x, 1), __shfl_xor_sync(kWholeWarp, v.y, 1)};
}

LITEVAE_DEVICE uint4 select(bool condition, const uint4& a, const uint4& b) {
  return {condition ? a.x : b.x, condition ? a.y : b.y, condition ? a.z : b.z, condition ? a.w : b.w};
}
LITEVAE_DEVICE uint2 select(bool condition, const uint2& a, const uint2& b) {
  return {condition ? a.x : b.x, condition ? a.y : b.y};
}

// The kernel keeps the threads of a warp together, so all of them take part in each exchange.
//
// Runs of kBytes, in units: vectors of 8 or 16 bytes, to which the runs are aligned. Every unit is moved with
// a neighbour. Of runs with three units, the first one's last goes with the second one's first.
template <int kBytes>
struct Runs {
  static constexpr int kUnitBytes = static_cast<int>(vector_bytes(kBytes)), kUnits = kBytes / kUnitBytes,
                       kUnitWords = kUnitBytes / 4, kWords = kBytes / 4;
  static_assert(kUnitBytes >= 8 && (kUnits == 3 || kUnits % 2 == 0), "");
  using Unit = typename std::conditional<kUnitBytes == 16, uint4, uint2>::type;
  using Words = uint32_t[kWords];

  const bool odd;             // this thread is the second of the pair
  size_t own, first, second;  // addresses of this thread's run, and of both in order

  LITEVAE_DEVICE explicit Runs(const void* run)
      : odd(threadIdx.x % 2 != 0), own(__cvta_generic_to_global(run)) {
    const size_t other = __shfl_xor_sync(kWholeWarp, own, 1);
    first = odd ? other : own;
    second = odd ? own : other;
  }

  static LITEVAE_DEVICE Unit unit_of(const Words& words, int i) {
    Unit unit;
    memcpy(&unit, words + i * kUnitWords, kUnitBytes);
    return unit;
  }
  static LITEVAE_DEVICE void set_unit(Words& words, int i, const Unit& unit) {
    memcpy(words + i * kUnitWords, &unit, kUnitBytes);
  }

  static LITEVAE_DEVICE Unit load_unit(size_t run, int i) {
    return __ldg(reinterpret_cast<const Unit*>(run + i * kUnitBytes));
  }
  static LITEVAE_DEVICE void store_unit(size_t run, int i, const Unit& unit) {
    store_global(run + i * kUnitBytes, unit);
  }

  LITEVAE_DEVICE void load(Words& words) const {
    if constexpr (kUnits == 3) {
      const Unit a = load_unit(first, odd), b = load_unit(own, odd ? 0 : 2),
                 c = load_unit(second, odd ? 2 : 1);
      set_unit(words, 0, select(odd, b, a));
      set_unit(words, 1, exchange(select(odd, a, c)));
      set_unit(words, 2, select(odd, c, b));
    } else {
      Unit a[kUnits / 2], b[kUnits / 2];
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        a[i] = load_unit(first, 2 * i + odd);
        b[i] = load_unit(second, 2 * i + odd);
      }
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        const Unit got = exchange(select(odd, a[i], b[i]));
        set_unit(words, 2 * i, select(odd, got, a[i]));
        set_unit(words, 2 * i + 1, select(odd, b[i], got));
      }
    }
  }

  LITEVAE_DEVICE void store(const Words& words) const {
    if constexpr (kUnits == 3) {
      const Unit begin = unit_of(words, 0), end = unit_of(words, 2), got = exchange(unit_of(words, 1));
      store_unit(first, odd, select(odd, got, begin));
      store_unit(own, odd ? 0 : 2, select(odd, begin, end));
      store_unit(second, odd ? 2 : 1, select(odd, end, got));
    } else {
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        const Unit low = unit_of(words, 2 * i), high = unit_of(words, 2 * i + 1);
        const Unit got = exchange(select(odd, low, high));
        store_unit(first, 2 * i + odd, select(odd, got, low));
        store_unit(second, 2 * i + odd, select(odd, high, got));
      }
    }
  }
};

// Move the N elements of each thread's run. One vector per run needs no partner: the threads' runs are
// adjacent.
template <class S>
struct PairedLoad {
  static constexpr bool kLoads = true;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(const char* at, T (&v)[N]) const {
    constexpr int kBytes = N * static_cast<int>(sizeof(S));
    if constexpr (kBytes <= 32 && kBytes % 16 == 0) {
      // Two vectors: the first cache has the second half of their sector.
      load_vector<S>(at, v);
    } else {
      uint32_t words[kBytes / 4];
      Runs<kBytes>(at).load(words);
      unpack<S>(words, v);
    }
  }
};

template <class S>
struct PairedStore {
  static constexpr bool kLoads = false;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(char* at, const T (&v)[N]) const {
    constexpr int kBytes = N * static_cast<int>(sizeof(S));
    if constexpr (kBytes <= 16) {
      store_vector<S>(at, v);
    } else {
      uint32_t words[kBytes / 4];
      pack<S>(v, words);
      Runs<kBytes>(at).store(words);
    }
  }
};

}  // namespace
}  // namespace haar
}  // namespace litevae
