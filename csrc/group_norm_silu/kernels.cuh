// The work of one thread block in each kernel of GroupNorm+SiLU. plan.cuh divides the tensors among the
// blocks and picks the kernels.
//
// Forward: Statistics computes the mean and the sum of squared deviations of each group in each chunk and
// slab, Combine computes the statistics of each group and the coefficients of its channels, and Apply writes
// y. Where the statistics of each channel are given, CombineChannels takes the place of the first two;
// addition.cuh has the kernels that compute them.
// Backward: Sums adds up dz and dz xhat of each channel in each chunk, Reduce adds these up over chunks and
// over the channels of a group, ApplyBackward writes the gradient of x, and Parameters adds up the gradients
// of weight and bias over the batch.
//
// With dz = dy/dz grad and xhat = (x - mean) rstd, the gradient of x is
// rstd (weight dz - mean over the group of weight dz - xhat mean over the group of weight dz xhat).
//
// The words for pieces of a tensor:
//   unit    The elements that a thread loads at once: 16 bytes of channels or of pixels, or one element.
//   slab    Successive channels, as many as one block works on.
//   chunk   Successive units along the pixels of an image, as many as one block works on.
//   table   The threads of a block. Each column takes the channels of one unit, and the rows of
//           a column share the units of the chunk.
//   part    The x or the skip half of a tensor. A class Part is one block's share: a slab and a chunk.
#pragma once

#include "../common/block.cuh"
#include "group_norm_silu.h"

namespace litevae {
namespace group_norm_silu {

// How the elements of a unit lie in memory.
enum class Kind {
  channels,  // channels are innermost: 16 bytes of one pixel's channels
  pixels,    // pixels are innermost: 16 bytes of one channel's pixels
  single     // one element; serves any strides and any type
};

constexpr int kThreads = 128;         // per block of a kernel that goes through the pixels
constexpr int kReduceThreads = 512;   // per block of a kernel that adds up their results, at most
constexpr int kClusterThreads = 512;  // per block of a cluster
constexpr int kParameterColumns = 8;  // channels per block of Parameters

namespace {

struct alignas(16) Pair {
  double first, second;
};

// The arguments of one launch.
struct Pass {
  int64_t blocks;
  int threads;

  Strided x[2];             // x and skip
  Strided grad[2], out[2];  // the parts of the other tensors with the same channels
  int64_t x_channels;       // number of channels of x
  bool flat;                // all pixels of an image are evenly spaced in all tensors
  int64_t pixels, width, channels, groups, group_channels, batch;
  Strided weight, bias, offset;
  const double* given[2];  // (N, C_x, 2) and (N, C_skip, 2): mean and variance of each channel, or null
  Strided grad_weight, grad_bias;
  double* stats;
  double eps;

  Table table;
  Divider by_row;         // divides a thread's number into its place within a row or column and the other one
  Divider inner, outer;   // divide a block's number into slab, chunk and image
  Divider by_group;       // divides a channel's number into its place in the group and the group
  int64_t slabs, chunks;  // per image
  int64_t slab;           // channels per slab
  int64_t chunk;          // units per chunk
  double chunk_pixels;    // pixels per chunk
  double last_pixels;     // pixels of the last chunk
  // (N, chunks, C): results of each chunk, backward of each channel, forward of each group in each slab:
  // those of a slab follow each other from its first channel's place.
  Pair* partial;
  void* coefficients;  // (3, N, C): mean, scale and constant of each channel, forward only
  bool is_double;      // whether the coefficients are
  Pair* sums;          // (N, C): sums over all pixels, backward only
  Pair* group_means;   // (N, groups)

  // Clusters only: bytes of shared memory per block, and where its channels and its groups begin, in bytes.
  int shared, channels_at, groups_at;
};

// Any type, known at run time only, with arithmetic in the widest one.
struct AnyType {
  float widest;
};
struct AnyTypeInDouble {
  double widest;
};

template <class S>
LITEVAE_CONSTEXPR int lanes_of(Kind kind) {
  return kind == Kind::single ? 1 : 16 / static_cast<int>(sizeof(S));
}

// Returns 1 / x, for a float with an error of one unit in the last place.
LITEVAE_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LITEVAE_DEVICE double reciprocal(double x) { return 1. / x; }

LITEVAE_DEVICE float sigmoid(float z) {
  // exp overflows to infinity, and 1 / infinity is 0. This is PTX because the intrinsic also spends time on
  // subnormal numbers.
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.4426950408889634f));
  return reciprocal(1.f + e);
}
LITEVAE_DEVICE double sigmoid(double z) { return 1. / (1. + exp(-z)); }

LITEVAE_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
LITEVAE_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

LITEVAE_DEVICE double parameter(const Strided& of, int64_t channel, double missing) {
  return of.data == nullptr ? missing : load_one<double>(of.data + channel * of.c, of.dtype);
}

// --- Code shared by the kernels that go through the pixels.

// The part of the tensors that one block works on.
template <class S, Kind kKind>
struct Part {
  static constexpr bool kAny = std::is_same<S, AnyType>::value || std::is_same<S, AnyTypeInDouble>::value;
  using T = std::conditional_t<sizeof(S) == sizeof(double), double, float>;
  static constexpr int V = lanes_of<S>(kKind);               // elements per unit
  static constexpr int K = kKind == Kind::channels ? V : 1;  // channels per unit

  const Pass& p;
  int64_t n, chunk, first_channel, begin;
  int count;  // number of units

  // `chunks_first`: whether successive blocks have successive chunks, and not successive slabs.
  LITEVAE_DEVICE Part(const Pass& p, int64_t block, bool chunks_first) : p(p), n(block) {
    const int64_t inner = p.inner.take(n), outer = p.outer.take(n);
    chunk = chunks_first ? inner : outer;
    first_channel = (chunks_first ? outer : inner) * p.slab;
    begin = chunk * p.chunk;
    const int64_t units = p.pixels / (V / K);
    count = static_cast<int>(units - begin < p.chunk ? units - begin : p.chunk);
  }
  // Neighbouring blocks read neighbouring memory.
  LITEVAE_DEVICE Part(const Pass& p, int64_t block) : Part(p, block, p.table.column_stride != 1) {}

  LITEVAE_DEVICE int channels() const {
    const int64_t rest = p.channels - first_channel;
    return static_cast<int>(rest < p.slab ? rest : p.slab);
  }
  // A thread's column and row in the table.
  struct Place {
    int column, row;
  };
  LITEVAE_DEVICE Place place(int thread) const {
    int64_t rest = thread;
    const int inner = static_cast<int>(p.by_row.take(rest)), outer = static_cast<int>(rest);
    const bool columns_first = p.table.column_stride == 1;
    return {columns_first ? inner : outer, columns_first ? outer : inner};
  }
  // Returns whether a thread has channels to work on, which the last columns may lack.
  LITEVAE_DEVICE bool has(int thread, const Place& place) const {
    return p.table.has(thread) && place.column * K < channels();
  }
  // Returns the number of the group, in its image, that a channel belongs to.
  LITEVAE_DEVICE int64_t group(int64_t channel) const {
    p.by_group.take(channel);
    return channel;
  }
  // Returns the place of a result of this block, by a number below its number of channels.
  LITEVAE_DEVICE Pair& partial(int index) const {
    return p.partial[(n * p.chunks + chunk) * p.channels + first_channel + index];
  }

  // A unit as it was loaded, which takes fewer registers than its unpacked values.
  struct Packed {
    uint32_t words[V * sizeof(S) / 4];
    LITEVAE_DEVICE void unpack(T (&to)[V]) const { litevae::unpack<S>(words, to); }
    LITEVAE_DEVICE void pack(const T (&from)[V], DType) { litevae::pack<S>(from, words); }
  };
  struct Value {
    T value;
    LITEVAE_DEVICE void unpack(T (&to)[V]) const { to[0] = value; }
    LITEVAE_DEVICE void pack(const T (&from)[V], DType dtype) { value = round_one(from[0], dtype); }
  };
  using Unit = std::conditional_t<kAny, Value, Packed>;

  // The units of one tensor that a column of threads works on, counted from the beginning of the chunk.
  struct Units {
    char* first;
    std::conditional_t<kKind == Kind::single, int64_t, int> step;
    int64_t begin, width, row_step;
    DType dtype;

    LITEVAE_DEVICE char* at(int unit) const {
      if constexpr (kKind != Kind::single) {
        // This is PTX because the compiler would multiply 64 bits by 64 bits.
        int64_t distance;
        asm("mul.wide.s32 %0, %1, %2;" : "=l"(distance) : "r"(unit), "r"(step));
        return first + distance;
      }
      if (width == 0) return first + static_cast<int64_t>(unit) * step;
      int64_t y = begin + unit;
      const int64_t x = take(y, width);
      return first + y * row_step + x * step;
    }
    template <Memory kMemory = Memory::constant>
    LITEVAE_DEVICE Unit load(int unit) const {
      Unit to;
      if constexpr (kAny)
        to.value = load_one<T, kMemory>(at(unit), dtype);
      else
        load_words<vector_bytes(V * sizeof(S)), kMemory>(at(unit), to.words);
      return to;
    }
    LITEVAE_DEVICE void store(int unit, const T (&from)[V]) const {
      if constexpr (kAny)
        store_one<T>(at(unit), dtype, from[0]);
      else
        store_vector<S>(at(unit), from);
    }
  };
  LITEVAE_DEVICE Units units(const Strided (&tensor)[2], const Place& place) const {
    int64_t c = first_channel + place.column * K;
    const bool in_skip = c >= p.x_channels;
    if (in_skip) c -= p.x_channels;
    const Strided& t = tensor[in_skip];
    char* const plane = t.data + n * t.n + c * t.c;
    if constexpr (kKind == Kind::pixels)
      return {plane + begin * 16, 16, 0, 0, 0, t.dtype};
    else if constexpr (kKind == Kind::channels)
      return {plane + begin * t.w, static_cast<int>(t.w), 0, 0, 0, t.dtype};
    else
      return {p.flat ? plane + begin * t.w : plane, t.w, begin, p.flat ? 0 : p.width, t.h, t.dtype};
  }
};

// Calls use(unit, values of each tensor) for the units of a thread in row `row`, and loads kBatch of them at
// once.
template <int kBatch, int kTensors, class Part, class Use>
LITEVAE_DEVICE void stream(const Part& part, int row, const typename Part::Units (&from)[kTensors],
                           const Use& use) {
  const int rows = part.p.table.rows, end = part.count;
#pragma unroll 1
  for (int unit = row; unit < end; unit += kBatch * rows) {
    typename Part::Unit loaded[kBatch][kTensors];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (unit + u * rows < end)
#pragma unroll
        for (int i = 0; i < kTensors; ++i) loaded[u][i] = from[i].load(unit + u * rows);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (unit + u * rows >= end) break;
      typename Part::T values[kTensors][Part::V];
#pragma unroll
      for (int i = 0; i < kTensors; ++i) loaded[u][i].unpack(values[i]);
      use(unit + u * rows, values);
    }
  }
}

// The coefficients of z = (x - mean) a + b for a channel. The mean is split in two, and the second half goes
// into b, so that the difference keeps its digits at any mean.
template <class T>
struct Coefficient {
  T mean, a, b;

  LITEVAE_DEVICE Coefficient(const Pass& p, int64_t channel, double exact, double rstd) {
    const double scale = rstd * parameter(p.weight, channel, 1.);
    mean = static_cast<T>(exact), a = static_cast<T>(scale);
    b = static_cast<T>(parameter(p.bias, channel, 0.) - (exact - static_cast<double>(mean)) * scale);
  }
};

// The coefficients of each channel of a block. Backward, the gradient of x is a dz - (x - mean) c - d.
template <class T, int kChannels, bool kGradient>
struct Coefficients {
  T mean[kChannels], a[kChannels], b[kChannels];
  T c[kGradient ? kChannels : 1], d[kGradient ? kChannels : 1];

  // Computes those of a block.
  template <class Part>
  LITEVAE_DEVICE void fill(const Block& block, const Part& part) {
    const Pass& p = part.p;
    block.each([&](int thread) {
      for (int i = thread; i < part.channels(); i += block.threads) {
        const int64_t channel = part.first_channel + i, group = part.n * p.groups + part.group(channel);
        const double exact = p.stats[2 * group], rstd = p.stats[2 * group + 1];
        const Coefficient<T> one(p, channel, exact, rstd);
        mean[i] = one.mean, a[i] = one.a, b[i] = one.b;
        const double low = exact - static_cast<double>(one.mean);
        if constexpr (kGradient) {
          const Pair means = p.group_means[group];
          const double slope = rstd * rstd * means.second;
          c[i] = static_cast<T>(slope), d[i] = static_cast<T>(rstd * means.first - low * slope);
        }
      }
    });
  }

  // Takes a thread's from those of its block.
  template <int kAll>
  LITEVAE_DEVICE void take(const Coefficients<T, kAll, kGradient>& all, int first) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      mean[k] = all.mean[first + k], a[k] = all.a[first + k], b[k] = all.b[first + k];
      if constexpr (kGradient) c[k] = all.c[first + k], d[k] = all.d[first + k];
    }
  }
};

// Computes y of the elements of a unit.
template <int K, int V, class T>
LITEVAE_DEVICE void apply(const T (&x)[V], const T (&mean)[K], const T (&a)[K], const T (&b)[K], T (&y)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int k = K == 1 ? 0 : v;
    const T z = multiply_add(x[v] - mean[k], a[k], b[k]);
    y[v] = z * sigmoid(z);
  }
}

// Returns dz of an element, with d = x - mean.
template <class T>
LITEVAE_DEVICE T gradient_of_z(T d, T a, T b, T grad) {
  const T z = multiply_add(d, a, b), s = sigmoid(z);
  return grad * s * multiply_add(z, 1 - s, T(1));
}

// Reduces a thread's sums over V lanes to sums over its K channels.
template <int K, int V, class T>
LITEVAE_DEVICE void add_lanes(T (&first)[V], T (&second)[V]) {
  if constexpr (K < V) {
#pragma unroll
    for (int v = 1; v < V; ++v) first[0] += first[v], second[0] += second[v];
  }
}

// Statistics of `count` elements of each of K channels: a shift, the mean minus the shift, and the sum of
// squared deviations from the mean. A single number for the mean would round it.
template <class T, int K>
struct alignas(16) Moments {
  T shift[K], mean[K], squares[K], count;

  Moments() = default;
  // Copies the numbers, and not the bytes after them.
  LITEVAE_DEVICE Moments& operator=(const Moments& from) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      shift[k] = from.shift[k], mean[k] = from.mean[k], squares[k] = from.squares[k];
    count = from.count;
    return *this;
  }

  // Adds the elements of others, which are at most as many.
  LITEVAE_DEVICE void merge(const Moments& others) {
    const T all = count + others.count, share = others.count * reciprocal(all > 0 ? all : 1);
    const T weight = count * share;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const T apart = (others.shift[k] - shift[k]) + (others.mean[k] - mean[k]);
      mean[k] = multiply_add(apart, share, mean[k]);
      squares[k] = multiply_add(apart * weight, apart, squares[k] + others.squares[k]);
    }
    count = all;
  }
};

// Joins the channels of a block to groups. `channel` returns mean and squared deviations of a channel of the
// block by its number, and `put` takes those of the channels of a group, by the group's number in the block.
template <class Part, class Channel, class Put>
LITEVAE_DEVICE void join_channels(const Block& block, const Part& part, const Channel& channel,
                                  const Put& put) {
  const Pass& p = part.p;
  const int64_t first_group = part.group(part.first_channel);
  const int channels = part.channels();
  const int groups = static_cast<int>(part.group(part.first_channel + channels - 1) - first_group) + 1;
  block.each([&](int thread) {
    for (int i = thread; i < groups; i += block.threads) {
      const int64_t first = (first_group + i) * p.group_channels - part.first_channel;
      const int begin = first < 0 ? 0 : static_cast<int>(first),
                end = smaller(first + p.group_channels, channels);
      double middle = 0, sum = 0, apart = 0, squares = 0;
#pragma unroll 1
      for (int c = begin; c < end; ++c) {
        const Pair one = channel(c);
        const double mean = one.first + parameter(p.offset, part.first_channel + c, 0.);
        if (c == begin) middle = mean;
        const double d = mean - middle;
        sum += d, apart += d * d, squares += one.second;
      }
      const double pixels = part.count * (Part::V / Part::K), distance = sum / (end - begin);
      put(i, Pair{middle + distance, squares + pixels * (apart - sum * distance)});
    }
  });
}

// The sums of a thread over its units, about a shift.
template <class Part>
struct Deviations {
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K;

  T shift[K] = {}, sum[V] = {}, squares[V] = {};
  int units = 0;

  // Adds a batch of loaded units, the first of which is `unit`. The shift is the mean of the first kSample
  // units, at least an eighth of all. The squared deviations from it add up to at most nine times those from
  // the mean.
  template <int kSample, int kBatch>
  LITEVAE_DEVICE void add(const typename Part::Unit (&loaded)[kBatch], int unit, int rows, int end) {
    if (units == 0) {
#pragma unroll
      for (int u = 0; u < kSample; ++u) {
        if (unit + u * rows >= end) break;
        T values[V];
        loaded[u].unpack(values);
#pragma unroll
        for (int v = 0; v < V; ++v) shift[K == 1 ? 0 : v] += values[v];
        ++units;
      }
      const T share = reciprocal(static_cast<T>(units * (V / K)));
#pragma unroll
      for (int k = 0; k < K; ++k) shift[k] *= share;
      units = 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (unit + u * rows >= end) break;
      T values[V];
      loaded[u].unpack(values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T d = values[v] - shift[K == 1 ? 0 : v];
        sum[v] += d, squares[v] = multiply_add(d, d, squares[v]);
      }
      ++units;
    }
  }

  LITEVAE_DEVICE Moments<T, K> moments() {
    add_lanes<K>(sum, squares);
    Moments<T, K> found;
    found.count = static_cast<T>(units * (V / K));
    const T share = reciprocal(units > 0 ? found.count : 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      found.shift[k] = shift[k], found.mean[k] = sum[k] * share;
      // with one rounding, because two squares that overflow would give a NaN
      found.squares[k] = multiply_add(-sum[k], found.mean[k], squares[k]);
    }
    return found;
  }
};

// Joins the rows of a block. `find` returns the moments of a thread's units by its number and place, and
// `put` takes mean and squared deviations of each channel, by its number in the block.
template <class Part, class Found, class Find, class Put>
LITEVAE_DEVICE void join_rows(const Block& block, const Part& part, Found (&joined)[kThreads],
                              const Find& find, const Put& put) {
  const Table& table = part.p.table;
  Private<Found> all(block);
  Private<typename Part::Place> places(block);
  const auto half = [](int rows) { return (rows + 1) / 2; };
  block.each([&](int thread) {
    const auto place = places[thread] = part.place(thread);
    const Found& found = all[thread] = find(thread, place);
    if (table.has(thread) && place.row >= half(table.rows)) joined[thread] = found;
  });
  // The upper half of the rows goes to the lower half until one row is left.
  for (int rows = table.rows; rows > 1; rows = half(rows)) {
    block.each([&](int thread) {
      const int row = places[thread].row, left = half(rows);
      if (!table.has(thread) || row >= left) return;
      if (row + left < rows) all[thread].merge(joined[thread + left * table.row_stride]);
      if (left > 1 && row >= half(left)) joined[thread] = all[thread];
    });
  }
  block.each([&](int thread) {
    const auto& place = places[thread];
    if (!part.has(thread, place) || place.row != 0) return;
    const Found& found = all[thread];
#pragma unroll
    for (int k = 0; k < Part::K; ++k)
      put(place.column * Part::K + k,
          static_cast<double>(found.shift[k]) + static_cast<double>(found.mean[k]), found.squares[k]);
  });
}

template <class S, Kind kKind>
struct Statistics {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K, kBatch = 8, kSample = 4;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 5;
  using Found = Moments<T, K>;
  struct Shared {
    Found rows[kThreads];
    double mean[kThreads];
    T squares[kThreads];
  };

  // Returns the statistics of a thread's units.
  static LITEVAE_DEVICE Found find(const Part& part, int thread, const typename Part::Place& place) {
    if (!part.has(thread, place)) return Found{};
    const auto from = part.units(part.p.x, place);
    const int rows = part.p.table.rows, end = part.count;
    Deviations<Part> found;
#pragma unroll 1
    for (int unit = place.row; unit < end; unit += kBatch * rows) {
      typename Part::Unit loaded[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (unit + u * rows < end) loaded[u] = from.load(unit + u * rows);
      found.template add<kSample>(loaded, unit, rows, end);
    }
    return found.moments();
  }

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const Part part(p, index);
    join_rows(
        block, part, shared.rows,
        [&](int thread, const typename Part::Place& place) { return find(part, thread, place); },
        [&](int i, double mean, T squares) { shared.mean[i] = mean, shared.squares[i] = squares; });
    join_channels(
        block, part, [&](int c) { return Pair{shared.mean[c], static_cast<double>(shared.squares[c])}; },
        [&](int i, const Pair& group) { part.partial(i) = group; });
  }
};

template <class S, Kind kKind>
struct Apply {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 6;
  struct Shared {};

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared&) {
    // Starts from the end, which the statistics read last and which may still be in the cache.
    const Part part(p, p.blocks - 1 - index);
    block.each([&](int thread) {
      const auto place = part.place(thread);
      if (!part.has(thread, place)) return;
      const int64_t channels = p.batch * p.channels;
      const T* from =
          static_cast<const T*>(p.coefficients) + part.n * p.channels + part.first_channel + place.column * K;
      T mean[K], a[K], b[K];
      load_vector<T>(from, mean), load_vector<T>(from + channels, a), load_vector<T>(from + 2 * channels, b);
      const auto y = part.units(p.out, place);
      stream<4>(part, place.row, {part.units(p.x, place)}, [&](int unit, const T(&x)[1][V]) {
        T result[V];
        apply(x[0], mean, a, b, result);
        y.store(unit, result);
      });
    });
  }
};

template <class S, Kind kKind>
struct Sums {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 5;
  struct Shared {
    T values[2 * K][kThreads], sums[2 * kThreads];
    Coefficients<T, kThreads, false> coefficients;
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const Part part(p, index);
    shared.coefficients.fill(block, part);
    block.each([&](int thread) {
      T sum[V] = {}, products[V] = {};
      const auto place = part.place(thread);
      if (part.has(thread, place)) {
        Coefficients<T, K, false> own;
        own.take(shared.coefficients, place.column * K);
        stream<2>(part, place.row, {part.units(p.x, place), part.units(p.grad, place)},
                  [&](int, const T(&x_grad)[2][V]) {
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                      const int k = K == 1 ? 0 : v;
                      const T d = x_grad[0][v] - own.mean[k];
                      const T dz = gradient_of_z(d, own.a[k], own.b[k], x_grad[1][v]);
                      sum[v] += dz, products[v] = multiply_add(dz, d, products[v]);
                    }
                  });
      }
      add_lanes<K>(sum, products);
#pragma unroll
      for (int k = 0; k < K; ++k)
        shared.values[k][thread] = sum[k], shared.values[K + k][thread] = products[k];
    });
    add_rows(block, p.table, shared.values, shared.sums);
    block.each([&](int thread) {
      for (int i = thread; i < part.channels(); i += block.threads) {
        const int at = i % K * p.table.columns + i / K;
        const double sum = shared.sums[at], products = shared.sums[K * p.table.columns + at];
        const double* const stats = p.stats + 2 * (part.n * p.groups + part.group(part.first_channel + i));
        const double low = stats[0] - static_cast<double>(shared.coefficients.mean[i]);
        part.partial(i) = {sum, (products - low * sum) * stats[1]};
      }
    });
  }
};

template <class S, Kind kKind>
struct ApplyBackward {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 5;
  using Shared = Coefficients<T, kThreads, true>;

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const Part part(p, p.blocks - 1 - index);
    shared.fill(block, part);
    block.each([&](int thread) {
      const auto place = part.place(thread);
      if (!part.has(thread, place)) return;
      Coefficients<T, K, true> own;
      own.take(shared, place.column * K);
      const auto to = part.units(p.out, place);
      stream<2>(part, place.row, {part.units(p.x, place), part.units(p.grad, place)},
                [&](int unit, const T(&x_grad)[2][V]) {
                  T result[V];
#pragma unroll
                  for (int v = 0; v < V; ++v) {
                    const int k = K == 1 ? 0 : v;
                    const T d = x_grad[0][v] - own.mean[k];
                    const T dz = gradient_of_z(d, own.a[k], own.b[k], x_grad[1][v]);
                    result[v] = multiply_add(own.a[k], dz, -multiply_add(d, own.c[k], own.d[k]));
                  }
                  to.store(unit, result);
                });
    });
  }
};

// --- The kernels that add up partial results. A block works on one group of one image (in Parameters, on
// kParameterColumns channels).

// Adds up a row's chunks of `channels` channels: the differences of their elements from a shift, and the
// squares of these. `from` has mean and squared deviations of the first chunk.
LITEVAE_DEVICE void add_chunks(const Pass& p, const Pair* from, double channels, double shift, int row,
                               int rows, double& sum, double& squares) {
#pragma unroll 4
  for (int64_t chunk = row; chunk < p.chunks; chunk += rows) {
    const Pair one = from[chunk * p.channels];
    const double count = channels * (chunk + 1 < p.chunks ? p.chunk_pixels : p.last_pixels);
    const double d = one.first - shift;
    sum += count * d, squares += one.second + count * d * d;
  }
}

// Returns mean and variance of `size` elements from such sums.
LITEVAE_DEVICE Pair mean_and_variance(double shift, double sum, double squares, double size) {
  const double share = 1. / size;
  const double difference = sum * share, square = squares * share;
  const double variance = square - difference * difference;
  return {shift + difference, variance < 0 ? 0 : variance};
}

struct Combine {
  static constexpr int kMaxThreads = kReduceThreads, kMinBlocks = 1;
  struct Shared {
    double values[2][kReduceThreads], sums[kReduceThreads], mean, rstd;
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    int64_t n = index;
    const int64_t group = take(n, p.groups), first = group * p.group_channels,
                  last = first + p.group_channels;
    const int64_t first_slab = first / p.slab, slabs = (last - 1) / p.slab - first_slab + 1;
    const Pair* const partial = p.partial + n * p.chunks * p.channels;
    // Returns where the group's results of a slab begin.
    const auto at = [&](int64_t slab) {
      int64_t channel = slab * p.slab;
      const int64_t begin = channel;
      p.by_group.take(channel);
      return begin + group - channel;
    };
    const Table table = Table::of(block, slabs);
    const double shift = partial[at(first_slab)].first;
    block.each([&](int thread) {
      double sum = 0, squares = 0;
      if (table.has(thread))
        for (int64_t i = table.column(thread); i < slabs; i += table.columns) {
          const int64_t slab = first_slab + i, begin = slab * p.slab, end = begin + p.slab;
          const auto channels =
              static_cast<double>((end < last ? end : last) - (begin > first ? begin : first));
          const Pair* const from = partial + at(slab);
          add_chunks(p, from, channels, shift, table.row(thread), table.rows, sum, squares);
        }
      shared.values[0][thread] = sum, shared.values[1][thread] = squares;
    });
    finish(p, index, block, shared, shift, static_cast<double>(p.group_channels * p.pixels));
  }

  // Writes what the kernel does, from the sums of `size` differences from the shift and of their squares.
  static LITEVAE_DEVICE void finish(const Pass& p, int64_t index, const Block& block, Shared& shared,
                                    double shift, double size) {
    int64_t n = index;
    const int64_t first = take(n, p.groups) * p.group_channels, last = first + p.group_channels;
    add_rows(block, Table{1, block.threads, 1, 1}, shared.values, shared.sums);
    block.each([&](int thread) {
      if (thread != 0) return;
      const Pair both = mean_and_variance(shift, shared.sums[0], shared.sums[1], size);
      shared.mean = both.first, shared.rstd = 1. / sqrt(both.second + p.eps);
      p.stats[2 * index] = shared.mean, p.stats[2 * index + 1] = shared.rstd;
    });
    block.each([&](int thread) {
      for (int64_t c = first + thread; c < last; c += block.threads) {
        // What is added to the input is subtracted from its mean.
        const double mean = shared.mean - parameter(p.offset, c, 0.);
        if (p.is_double)
          store(static_cast<double*>(p.coefficients), p, n, c, Coefficient<double>(p, c, mean, shared.rstd));
        else
          store(static_cast<float*>(p.coefficients), p, n, c, Coefficient<float>(p, c, mean, shared.rstd));
      }
    });
  }

  template <class T>
  static LITEVAE_DEVICE void store(T* to, const Pass& p, int64_t n, int64_t c, const Coefficient<T>& one) {
    const int64_t all = p.batch * p.channels, i = n * p.channels + c;
    to[i] = one.mean, to[all + i] = one.a, to[2 * all + i] = one.b;
  }
};

struct CombineChannels {
  static constexpr int kMaxThreads = kReduceThreads, kMinBlocks = 1;
  using Shared = Combine::Shared;

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    int64_t n = index;
    const int64_t first = take(n, p.groups) * p.group_channels, last = first + p.group_channels;
    const auto statistics = [&](int64_t c) {
      return c < p.x_channels ? p.given[0] + 2 * (n * p.x_channels + c)
                              : p.given[1] + 2 * (n * (p.channels - p.x_channels) + c - p.x_channels);
    };
    const double shift = *statistics(first);
    block.each([&](int thread) {
      double sum = 0, squares = 0;
      for (int64_t c = first + thread; c < last; c += block.threads) {
        const double* const one = statistics(c);
        const double d = one[0] + parameter(p.offset, c, 0.) - shift;
        sum += d, squares += one[1] + d * d;
      }
      shared.values[0][thread] = sum, shared.values[1][thread] = squares;
    });
    Combine::finish(p, index, block, shared, shift, static_cast<double>(p.group_channels));
  }
};

struct Reduce {
  static constexpr int kMaxThreads = kReduceThreads, kMinBlocks = 1;
  struct Shared {
    double values[2][kReduceThreads], sums[2 * kReduceThreads], group[2][kReduceThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    int64_t n = index;
    const int64_t first = take(n, p.groups) * p.group_channels;
    const Pair* const partial = p.partial + n * p.chunks * p.channels + first;
    const Table table = Table::of(block, p.group_channels), all{1, block.threads, 1, 1};
    block.each([&](int thread) { shared.group[0][thread] = shared.group[1][thread] = 0; });
    for (int64_t from = 0; from < p.group_channels; from += table.columns) {
      block.each([&](int thread) {
        const int64_t c = from + table.column(thread);
        double sum = 0, products = 0;
        if (table.has(thread) && c < p.group_channels)
#pragma unroll 4
          for (int64_t chunk = table.row(thread); chunk < p.chunks; chunk += table.rows) {
            const Pair one = partial[chunk * p.channels + c];
            sum += one.first, products += one.second;
          }
        shared.values[0][thread] = sum, shared.values[1][thread] = products;
      });
      add_rows(block, table, shared.values, shared.sums);
      block.each([&](int thread) {
        const int64_t c = first + from + thread;
        if (thread >= table.columns || from + thread >= p.group_channels) return;
        const Pair both{shared.sums[thread], shared.sums[table.columns + thread]};
        const double weight = parameter(p.weight, c, 1.);
        p.sums[n * p.channels + c] = both;
        shared.group[0][thread] += weight * both.first, shared.group[1][thread] += weight * both.second;
      });
    }
    add_rows(block, all, shared.group, shared.sums);
    block.each([&](int thread) {
      if (thread != 0) return;
      const double share = 1. / static_cast<double>(p.group_channels * p.pixels);
      p.group_means[index] = {shared.sums[0] * share, shared.sums[1] * share};
    });
  }
};

struct Parameters {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 1;
  struct Shared {
    double values[2][kThreads], sums[kThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const int64_t first = index * kParameterColumns;
    const Table table = Table::of(block, kParameterColumns);
    block.each([&](int thread) {
      const int64_t c = first + table.column(thread);
      double sum = 0, products = 0;
      if (c < p.channels)
#pragma unroll 4
        for (int64_t n = table.row(thread); n < p.batch; n += table.rows) {
          const Pair one = p.sums[n * p.channels + c];
          sum += one.first, products += one.second;
        }
      shared.values[0][thread] = sum, shared.values[1][thread] = products;
    });
    add_rows(block, table, shared.values, shared.sums);
    block.each([&](int thread) {
      const int64_t c = first + thread;
      if (thread >= kParameterColumns || c >= p.channels) return;
      const Strided &bias = p.grad_bias, &weight = p.grad_weight;
      if (bias.data != nullptr) store_one(bias.data + c * bias.c, bias.dtype, shared.sums[thread]);
      if (weight.data != nullptr)
        store_one(weight.data + c * weight.c, weight.dtype, shared.sums[kParameterColumns + thread]);
    });
  }
};

}  // namespace
}  // namespace group_norm_silu
}  // namespace litevae
