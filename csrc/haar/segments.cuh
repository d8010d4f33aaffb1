// How the threads of a warp move runs of adjacent elements, one run each, to which no vectors are aligned:
// through shared memory. Between that and global memory the warp moves whole vectors, and single elements at
// both ends.
#pragma once

#include "pairs.cuh"

namespace litevae {
namespace haar {
namespace {

constexpr int kVector = 16;

// Bytes from one thread's run to the next one's in shared memory, with room for what precedes the first
// vector.
LITEVAE_CONSTEXPR int pitch_of(int run) { return (run + kVector - 1) / kVector * kVector + kVector; }

// Threads read their runs at a stride of the run. A word is left out after every 32, so that they read from
// different banks.
constexpr int kGap = 32;
LITEVAE_CONSTEXPR unsigned with_gaps(unsigned byte) { return byte + byte / (4 * kGap) * 4; }

// A warp's share of shared memory, for runs of the largest size: four pixels' 12 coefficients in float32.
LITEVAE_DEVICE char* memory_of_warp() {
  constexpr int kLargest = 4 * 12 * 4;
  __shared__ uint32_t memory[kThreads / kWarp][with_gaps(kWarp * pitch_of(kLargest)) / 4];
  return reinterpret_cast<char*>(memory[threadIdx.x / kWarp]);
}

// The runs of neighbouring threads that follow each other in memory, this thread's among them. A thread that
// repeats the work of the one before belongs to them as well. Elements have kBytes / kCount bytes: 2 or 4.
// All offsets are in bytes from the first run.
template <int kBytes, int kCount>
struct Segment {
  static constexpr int kSize = kBytes / kCount, kWords = kBytes / 4;
  using Element = typename std::conditional<kSize == 4, uint32_t, uint16_t>::type;
  using Words = uint32_t[kWords];

  size_t begin;           // address of the first run
  unsigned own, end;      // this thread's run, and what follows the last one
  unsigned index, count;  // of this thread, among those of the segment
  unsigned lead;          // the first vector
  unsigned slot;          // of the first run in `memory`: as many bytes after a vector as in global memory
  char* memory;

  LITEVAE_DEVICE Segment(const void* run, char* memory) : memory(memory) {
    const size_t address = __cvta_generic_to_global(run);
    const unsigned lane = threadIdx.x % kWarp;
    const size_t before = __shfl_up_sync(kWholeWarp, address, 1);
    const bool is_first = lane == 0 || (address != before + kBytes && address != before);
    const unsigned firsts = __ballot_sync(kWholeWarp, is_first), so_far = kWholeWarp >> (kWarp - 1 - lane);
    const unsigned first = kWarp - 1 - __clz(static_cast<int>(firsts & so_far));
    const unsigned last = __clz(static_cast<int>(__brev(firsts & ~so_far))) - 1;  // before the next first one
    begin = __shfl_sync(kWholeWarp, address, static_cast<int>(first));
    own = static_cast<unsigned>(address - begin);
    end = __shfl_sync(kWholeWarp, own, static_cast<int>(last)) + kBytes;
    index = lane - first, count = last - first + 1;
    lead = static_cast<unsigned>(-begin) % kVector;
    slot = first * pitch_of(kBytes) + static_cast<unsigned>(begin) % kVector;
  }

  LITEVAE_DEVICE void load(Words& words) const {
    __syncwarp();  // The warp may still be reading what it moved before.
    uint4 vectors[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (has_vector(i)) vectors[i] = __ldg(reinterpret_cast<const uint4*>(begin + vector(i)));
    each_single([&](unsigned i) { shared<Element>(i) = __ldg(reinterpret_cast<const Element*>(begin + i)); });
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (has_vector(i)) {
        uint32_t* const to = &shared<uint32_t>(vector(i));
        to[0] = vectors[i].x, to[1] = vectors[i].y, to[2] = vectors[i].z, to[3] = vectors[i].w;
      }
    __syncwarp();
    const Run run(*this);
    uint32_t next = run.shift == 0 ? run.word(0) : uint32_t{run.half(0, 1)} << 16;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = next;
      if (i + 1 < kWords)
        next = run.word(i + 1);
      else if (run.shift != 0)
        next = run.half(kWords, 0);
      words[i] = __funnelshift_r(word, next, run.shift);
    }
  }

  LITEVAE_DEVICE void store(const Words& words) const {
    __syncwarp();
    const Run run(*this);
    if (run.shift == 0)
      run.word(0) = words[0];
    else
      run.half(0, 1) = static_cast<uint16_t>(words[0]);
#pragma unroll
    for (int i = 1; i < kWords; ++i) run.word(i) = __funnelshift_l(words[i - 1], words[i], run.shift);
    if (run.shift != 0) run.half(kWords, 0) = static_cast<uint16_t>(words[kWords - 1] >> 16);
    __syncwarp();
    each_single([&](unsigned i) { store_global(begin + i, shared<Element>(i)); });
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (has_vector(i)) {
        const uint32_t* const from = &shared<uint32_t>(vector(i));
        store_global(begin + vector(i), uint4{from[0], from[1], from[2], from[3]});
      }
  }

 private:
  static constexpr int kVectors = (kBytes + kVector - 1) / kVector;  // of each thread, at most

  // The words of shared memory that hold this thread's run.
  struct Run {
    unsigned shift;  // bits of the first word that precede the run, which may have 16-bit elements
    uint32_t* first;
    int before_gap;  // number of words before the first gap

    LITEVAE_DEVICE explicit Run(const Segment& s) {
      const unsigned offset = s.slot + s.own, extra = kSize == 4 ? 0 : offset % 4;
      shift = 8 * extra;
      first = &s.shared<uint32_t>(s.own - extra);
      before_gap = static_cast<int>(kGap - offset / 4 % kGap);
    }
    // Selecting one of three addresses takes fewer instructions than with_gaps does for each word.
    LITEVAE_DEVICE uint32_t& word(int i) const {
      return (i < before_gap ? first : i < before_gap + kGap ? first + 1 : first + 2)[i];
    }
    LITEVAE_DEVICE uint16_t& half(int i, int which) const {
      return reinterpret_cast<uint16_t*>(&word(i))[which];
    }
  };

  template <class U>
  LITEVAE_DEVICE U& shared(unsigned offset) const {
    return *reinterpret_cast<U*>(memory + with_gaps(slot + offset));
  }
  LITEVAE_DEVICE unsigned vector(int i) const { return lead + (index + i * count) * kVector; }
  LITEVAE_DEVICE bool has_vector(int i) const { return vector(i) + kVector <= end; }

  // Calls `move` with the elements before the first vector and after the last one.
  template <class Move>
  LITEVAE_DEVICE void each_single(const Move& move) const {
    const unsigned last =
        end - (static_cast<unsigned>(begin) + end) % kVector;  // wraps if there is no vector
    for (unsigned i = index * kSize; i < lead && i < end; i += count * kSize) move(i);
    if (lead + kVector <= end || lead == last)
      for (unsigned i = last + index * kSize; i < end; i += count * kSize) move(i);
  }
};

// Move the N elements of each thread's run.
template <class S>
struct SegmentLoad {
  static constexpr bool kLoads = true;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(const char* from, T (&v)[N]) const {
    constexpr int kBytes = N * static_cast<int>(sizeof(S));
    uint32_t words[kBytes / 4];
    Segment<kBytes, N>(from, memory_of_warp()).load(words);
    unpack<S>(words, v);
  }
};

template <class S>
struct SegmentStore {
  static constexpr bool kLoads = false;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(char* to, const T (&v)[N]) const {
    constexpr int kBytes = N * static_cast<int>(sizeof(S));
    uint32_t words[kBytes / 4];
    pack<S>(v, words);
    Segment<kBytes, N>(to, memory_of_warp()).store(words);
  }
};

}  // namespace
}  // namespace haar
}  // namespace litevae
