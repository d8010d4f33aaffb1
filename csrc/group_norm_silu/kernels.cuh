// The work of one thread block in each kernel of GroupNorm+SiLU. plan.cuh divides the tensors among the
// blocks and picks the kernels.
//
// Forward: Statistics computes the mean and the sum of squared deviations of each channel in each chunk,
// Combine computes the statistics of each group, and Apply writes y. Backward: Sums adds up dz and dz xhat of
// each channel in each chunk, Reduce adds these up over chunks and over the channels of a group,
// ApplyBackward writes the gradient of x, and Parameters adds up the gradients of weight and bias over the
// batch.
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
  Strided weight, bias;
  Strided grad_weight, grad_bias;
  double* stats;
  double eps;

  Table table;
  int64_t slabs, chunks;  // per image
  int64_t chunk;          // units per chunk
  double chunk_pixels;    // pixels per chunk
  double last_pixels;     // pixels of the last chunk
  Pair* partial;          // (N, chunks, C): results of each chunk
  Pair* sums;             // (N, C): sums over all pixels, backward only
  Pair* group_means;      // (N, groups)
};

// Any 16-bit or 32-bit type, known at run time only.
struct AnyType {
  float widest;
};

template <class S>
LITEVAE_CONSTEXPR int lanes_of(Kind kind) {
  return kind == Kind::single ? 1 : 16 / static_cast<int>(sizeof(S));
}

LITEVAE_DEVICE float sigmoid(float z) {
  // exp overflows to infinity, and 1 / infinity is 0. This is PTX because the intrinsics also spend time on
  // subnormal numbers.
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
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
  static constexpr bool kAny = std::is_same<S, AnyType>::value;
  using T = std::conditional_t<std::is_same<S, double>::value, double, float>;
  static constexpr int V = lanes_of<S>(kKind);               // elements per unit
  static constexpr int K = kKind == Kind::channels ? V : 1;  // channels per unit

  const Pass& p;
  int64_t n, chunk, first_channel, begin;
  int count;  // number of units

  LITEVAE_DEVICE Part(const Pass& p, int64_t block) : p(p) {
    int64_t slab;
    if (p.table.column_stride == 1) {  // neighbouring blocks read neighbouring memory
      slab = take(block, p.slabs), chunk = take(block, p.chunks);
    } else {
      chunk = take(block, p.chunks), slab = take(block, p.slabs);
    }
    n = block;
    first_channel = slab * p.table.columns * K;
    begin = chunk * p.chunk;
    const int64_t units = p.pixels / (V / K);
    count = static_cast<int>(units - begin < p.chunk ? units - begin : p.chunk);
  }

  LITEVAE_DEVICE int channels() const {
    const int64_t rest = p.channels - first_channel, columns = p.table.columns * K;
    return static_cast<int>(rest < columns ? rest : columns);
  }
  // Returns whether a thread has channels to work on, which the last columns may lack.
  LITEVAE_DEVICE bool has(int thread) const {
    return p.table.has(thread) && p.table.column(thread) * K < channels();
  }
  // Returns the index, over the whole batch, of the group that a channel belongs to.
  LITEVAE_DEVICE int64_t group(int64_t channel) const {
    take(channel, p.group_channels);
    return n * p.groups + channel;
  }
  LITEVAE_DEVICE Pair& partial(int channel) const {
    return p.partial[(n * p.chunks + chunk) * p.channels + first_channel + channel];
  }

  // A unit as it was loaded, which takes fewer registers than its unpacked values.
  struct Packed {
    uint32_t words[V * sizeof(S) / 4];
    LITEVAE_DEVICE void unpack(T (&to)[V]) const { litevae::unpack<S>(words, to); }
  };
  struct Value {
    T value;
    LITEVAE_DEVICE void unpack(T (&to)[V]) const { to[0] = value; }
  };
  using Unit = std::conditional_t<kAny, Value, Packed>;

  // The units of one tensor that a column of threads works on, counted from the beginning of the chunk.
  struct Units {
    char* first;
    std::conditional_t<kKind == Kind::single, int64_t, int> step;
    int64_t begin, width, row_step;
    DType dtype;

    LITEVAE_DEVICE char* at(int unit) const {
      if (kKind != Kind::single || width == 0) return first + static_cast<int64_t>(unit) * step;
      int64_t y = begin + unit;
      const int64_t x = take(y, width);
      return first + y * row_step + x * step;
    }
    LITEVAE_DEVICE Unit load(int unit) const {
      Unit to;
      if constexpr (kAny)
        to.value = load_one<T>(at(unit), dtype);
      else
        load_words<vector_bytes(V * sizeof(S))>(at(unit), to.words);
      return to;
    }
    LITEVAE_DEVICE void store(int unit, const T (&from)[V]) const {
      if constexpr (kAny)
        store_one<T>(at(unit), dtype, from[0]);
      else
        store_vector<S>(at(unit), from);
    }
  };
  LITEVAE_DEVICE Units units(const Strided (&tensor)[2], int thread) const {
    int64_t c = first_channel + p.table.column(thread) * K;
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

// Calls use(unit, values of each tensor) for a thread's units below `end`, and loads kBatch of them at once.
template <int kBatch, int kTensors, class Part, class Use>
LITEVAE_DEVICE void stream(const Part& part, int thread, int end,
                           const typename Part::Units (&from)[kTensors], const Use& use) {
  const int rows = part.p.table.rows;
#pragma unroll 1
  for (int unit = part.p.table.row(thread); unit < end; unit += kBatch * rows) {
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

// The coefficients of z = (x - mean) a + b for each channel of a block. The mean is split in two, and the
// second half goes into b, so that the difference keeps its digits at any mean. Backward, the gradient of x
// is a dz - (x - mean) c - d.
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
        const int64_t channel = part.first_channel + i, group = part.group(channel);
        const double exact = p.stats[2 * group], rstd = p.stats[2 * group + 1];
        const double scale = rstd * parameter(p.weight, channel, 1.);
        mean[i] = static_cast<T>(exact), a[i] = static_cast<T>(scale);
        const double low = exact - static_cast<double>(mean[i]);
        b[i] = static_cast<T>(parameter(p.bias, channel, 0.) - low * scale);
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

template <class S, Kind kKind>
struct Statistics {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K, kBatch = 4;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 6;
  struct Shared {
    T values[K][kThreads], sums[kThreads], shift[kThreads];
  };
  // A thread's statistics of its units: for each channel a shift, the mean minus the shift, and the sum of
  // squared deviations from the mean. A single number for the mean would round it.
  struct Found {
    T count, shift[K], mean[K], squares[K];
  };

  static LITEVAE_DEVICE Found find(const Part& part, int thread) {
    Found found{};
    const int first = part.p.table.row(thread), rows = part.p.table.rows;
    if (!part.has(thread) || first >= part.count) return found;
    const typename Part::Units from[] = {part.units(part.p.x, thread)};
    const auto count = [&](int end) { return static_cast<T>((end - first + rows - 1) / rows * (V / K)); };
    // The shift is the mean of the first units, at least an eighth of all. The squared deviations from it add
    // up to at most nine times those from the mean.
    const int some = smaller(part.count, kBatch * rows);
    stream<kBatch>(part, thread, some, from, [&](int, const T(&x)[1][V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) found.shift[K == 1 ? 0 : v] += x[0][v];
    });
    T share = 1 / count(some), sum[V] = {}, squares[V] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) found.shift[k] *= share;
    stream<kBatch>(part, thread, part.count, from, [&](int, const T(&x)[1][V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T d = x[0][v] - found.shift[K == 1 ? 0 : v];
        sum[v] += d, squares[v] = multiply_add(d, d, squares[v]);
      }
    });
    add_lanes<K>(sum, squares);
    found.count = count(part.count), share = 1 / found.count;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      found.mean[k] = sum[k] * share;
      // with one rounding, because two squares that overflow would give a NaN
      found.squares[k] = multiply_add(-sum[k], found.mean[k], squares[k]);
    }
    return found;
  }

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    const Part part(p, index);
    const Table& table = p.table;
    Private<Found> all(block);
    block.each([&](int thread) {
      Found& found = all[thread] = find(part, thread);
      if (table.has(thread) && table.row(thread) == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) shared.shift[k * table.columns + table.column(thread)] = found.shift[k];
      }
    });
    const T share = 1 / static_cast<T>(part.count * (V / K));
    block.each([&](int thread) {
      if (!table.has(thread)) return;
      Found& found = all[thread];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        found.mean[k] += found.shift[k] - shared.shift[k * table.columns + table.column(thread)];
        shared.values[k][thread] = found.count * found.mean[k];
      }
    });
    add_rows(block, table, shared.values, shared.sums);
    block.each([&](int thread) {
      if (!table.has(thread)) return;
      Found& found = all[thread];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T d = found.mean[k] - shared.sums[k * table.columns + table.column(thread)] * share;
        shared.values[k][thread] = multiply_add(found.count * d, d, found.squares[k]);
      }
    });
    block.each([&](int thread) {
      for (int i = thread; i < part.channels(); i += block.threads) {
        const int at = i % K * table.columns + i / K;
        part.partial(i).first = static_cast<double>(shared.shift[at]) +
                                static_cast<double>(shared.sums[at]) * static_cast<double>(share);
      }
    });
    add_rows(block, table, shared.values, shared.sums);
    block.each([&](int thread) {
      for (int i = thread; i < part.channels(); i += block.threads)
        part.partial(i).second = shared.sums[i % K * table.columns + i / K];
    });
  }
};

template <class S, Kind kKind>
struct Apply {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 6;
  using Shared = Coefficients<T, kThreads, false>;

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    // Starts from the end, which the statistics read last and which may still be in the cache.
    const Part part(p, p.blocks - 1 - index);
    shared.fill(block, part);
    block.each([&](int thread) {
      if (!part.has(thread)) return;
      Coefficients<T, K, false> own;
      own.take(shared, p.table.column(thread) * K);
      const auto y = part.units(p.out, thread);
      stream<4>(part, thread, part.count, {part.units(p.x, thread)}, [&](int unit, const T(&x)[1][V]) {
        T result[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int k = K == 1 ? 0 : v;
          const T z = multiply_add(x[0][v] - own.mean[k], own.a[k], own.b[k]);
          result[v] = z * sigmoid(z);
        }
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
      if (part.has(thread)) {
        Coefficients<T, K, false> own;
        own.take(shared.coefficients, p.table.column(thread) * K);
        stream<2>(part, thread, part.count, {part.units(p.x, thread), part.units(p.grad, thread)},
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
        const double* const stats = p.stats + 2 * part.group(part.first_channel + i);
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
      if (!part.has(thread)) return;
      Coefficients<T, K, true> own;
      own.take(shared, p.table.column(thread) * K);
      const auto to = part.units(p.out, thread);
      stream<2>(part, thread, part.count, {part.units(p.x, thread), part.units(p.grad, thread)},
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

struct Combine {
  static constexpr int kMaxThreads = kReduceThreads, kMinBlocks = 1;
  struct Shared {
    double values[2][kReduceThreads], sums[kReduceThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    int64_t n = index;
    const int64_t first = take(n, p.groups) * p.group_channels;
    const Pair* const partial = p.partial + n * p.chunks * p.channels + first;
    const Table table = Table::of(block, p.group_channels), all{1, block.threads, 1, 1};
    const double shift = partial[0].first;
    block.each([&](int thread) {
      double sum = 0, squares = 0;
      if (table.has(thread))
        for (int64_t c = table.column(thread); c < p.group_channels; c += table.columns)
#pragma unroll 4
          for (int64_t chunk = table.row(thread); chunk < p.chunks; chunk += table.rows) {
            const Pair one = partial[chunk * p.channels + c];
            const double count = chunk + 1 < p.chunks ? p.chunk_pixels : p.last_pixels;
            const double d = one.first - shift;
            sum += count * d, squares += one.second + count * d * d;
          }
      shared.values[0][thread] = sum, shared.values[1][thread] = squares;
    });
    add_rows(block, all, shared.values, shared.sums);
    block.each([&](int thread) {
      if (thread != 0) return;
      const double share = 1. / static_cast<double>(p.group_channels * p.pixels);
      const double difference = shared.sums[0] * share, square = shared.sums[1] * share;
      double variance = square - difference * difference;
      if (variance < 0) variance = 0;
      p.stats[2 * index] = shift + difference, p.stats[2 * index + 1] = 1. / sqrt(variance + p.eps);
    });
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
