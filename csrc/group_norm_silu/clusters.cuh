// GroupNorm+SiLU in one pass, for GPUs with thread-block clusters (sm_90 and newer). The blocks of a cluster
// read whole groups of an image once, keep them in their shared memory, exchange the statistics through it,
// and write the result: plan.cuh divides the work among them.
#pragma once

#include "kernels.cuh"

namespace litevae {
namespace group_norm_silu {
namespace {

template <class S, Kind kKind>
struct Clustered {
  using Part = group_norm_silu::Part<S, kKind>;
  using T = typename Part::T;
  using Unit = typename Part::Unit;
  static constexpr int V = Part::V, K = Part::K, kBatch = 8;
  static constexpr int kMaxThreads = kClusterThreads, kMinBlocks = 1;
  struct Shared {
    T sum[K][kClusterThreads / 2], squares[K][kClusterThreads / 2];  // of the upper half of the rows
  };
  // A channel's shift, and the sums of the deviations from it and of their squares; later the coefficients.
  struct Channel {
    T numbers[3];
  };

  // The units of a thread in shared memory. No other thread uses them.
  struct Held {
    Unit* first;
    int step;

    LITEVAE_DEVICE void store(int i, const Unit& unit) const {
      if constexpr (sizeof(Unit) == 16)
        *reinterpret_cast<uint4*>(first + i * step) = bit_cast<uint4>(unit);
      else
        first[i * step] = unit;
    }
    LITEVAE_DEVICE void load(int i, T (&to)[V]) const {
      if constexpr (sizeof(Unit) == 16)
        bit_cast<Unit>(*reinterpret_cast<const uint4*>(first + i * step)).unpack(to);
      else
        first[i * step].unpack(to);
    }
  };

  // The statistics of a thread's units: the deviations are those from the mean, which is the sum of two
  // numbers, because one would round it.
  struct Found {
    T mean[K], low[K], squares[K], count;
  };

  // Moves a thread's units to shared memory, and adds up the differences from the first ones for the mean.
  // Then goes through them again for the deviations.
  static LITEVAE_DEVICE Found fetch(const typename Part::Units& from, int row, int rows, int units,
                                    const Held& held) {
    T first[K] = {}, sum[V] = {};
#pragma unroll 1
    for (int i = 0; i < units; i += kBatch) {
      Unit loaded[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (i + u < units) loaded[u] = from.load(row + (i + u) * rows);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (i + u >= units) break;
        held.store(i + u, loaded[u]);
        T values[V];
        loaded[u].unpack(values);
        if (i + u == 0)
#pragma unroll
          for (int k = 0; k < K; ++k) first[k] = values[k];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += values[v] - first[K == 1 ? 0 : v];
      }
    }
    Found found;
    found.count = static_cast<T>(units * (V / K));
    const T share = reciprocal(units > 0 ? found.count : 1);
    if constexpr (K < V)
#pragma unroll
      for (int v = 1; v < V; ++v) sum[0] += sum[v];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      found.mean[k] = multiply_add(sum[k], share, first[k]);
      found.low[k] = multiply_add(sum[k], share, first[k] - found.mean[k]);
    }
    T squares[V] = {};
#pragma unroll 4
    for (int i = 0; i < units; ++i) {
      T values[V];
      held.load(i, values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T d = values[v] - found.mean[K == 1 ? 0 : v];
        squares[v] = multiply_add(d, d, squares[v]);
      }
    }
    if constexpr (K < V)
#pragma unroll
      for (int v = 1; v < V; ++v) squares[0] += squares[v];
#pragma unroll
    for (int k = 0; k < K; ++k)
      found.squares[k] = multiply_add(-found.count * found.low[k], found.low[k], squares[k]);
    return found;
  }

  // Adds up the statistics of the rows of the table, in shared memory.
  static LITEVAE_DEVICE void join_rows(const Part& part, const typename Part::Place& place, bool works,
                                       Found found, Channel* channels, Shared& shared) {
    const Table& table = part.p.table;
    const int first = place.column * K;
    if (works && place.row == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) channels[first + k].numbers[0] = found.mean[k];
    __syncthreads();
    // From here on, they are sums of deviations from the first row's mean.
    T sum[K] = {}, squares[K] = {};
    if (works)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T apart = found.mean[k] - channels[first + k].numbers[0] + found.low[k];
        sum[k] = found.count * apart;
        squares[k] = multiply_add(sum[k], apart, found.squares[k]);
      }
    // The upper half of the rows goes to the lower half until one row is left.
    for (int rows = table.rows; rows > 1;) {
      const int left = (rows + 1) / 2, upper = place.row - left;
      if (works && upper >= 0 && place.row < rows)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          shared.sum[k][upper * table.columns + place.column] = sum[k];
          shared.squares[k][upper * table.columns + place.column] = squares[k];
        }
      __syncthreads();
      if (works && place.row + left < rows)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          sum[k] += shared.sum[k][place.row * table.columns + place.column];
          squares[k] += shared.squares[k][place.row * table.columns + place.column];
        }
      __syncthreads();
      rows = left;
    }
    if (works && place.row == 0)
#pragma unroll
      for (int k = 0; k < K; ++k)
        channels[first + k].numbers[1] = sum[k], channels[first + k].numbers[2] = squares[k];
    __syncthreads();
  }

  // Returns mean and rstd of a group, from those of its chunks in all blocks of the cluster.
  static LITEVAE_DEVICE Pair join_blocks(const Part& part, const Pair* own) {
    const Pass& p = part.p;
    const int64_t units = p.pixels / (V / K);
    double shift = 0, sum = 0, squares = 0;
#pragma unroll 4
    for (int rank = 0; rank < static_cast<int>(p.chunks); ++rank) {
      const int64_t rest = units - rank * p.chunk;
      if (rest <= 0) break;
      const Pair one = *static_cast<const Pair*>(__cluster_map_shared_rank(own, rank));
      if (rank == 0) shift = one.first;
      const auto count = static_cast<double>((rest < p.chunk ? rest : p.chunk) * (V / K) * p.group_channels);
      const double d = one.first - shift;
      sum += count * d, squares += one.second + count * d * d;
    }
    const double share = 1. / static_cast<double>(p.group_channels * p.pixels), difference = sum * share;
    double variance = squares * share - difference * difference;
    if (variance < 0) variance = 0;
    return {shift + difference, 1. / sqrt(variance + p.eps)};
  }

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    Part part(p, index, true);
    if (part.count < 0) part.count = 0;  // There are fewer pixels than blocks.
    char* const memory = static_cast<char*>(block.dynamic_shared);
    auto* const channels = reinterpret_cast<Channel*>(memory + p.channels_at);
    auto* const found = reinterpret_cast<Pair*>(memory + p.groups_at);
    Pair* const joined = found + p.slab / p.group_channels;
    const int thread = static_cast<int>(threadIdx.x), rows = p.table.rows;
    const auto place = part.place(thread);
    const bool works = part.has(thread, place);
    const int units = works && place.row < part.count ? (part.count - place.row + rows - 1) / rows : 0;
    const Held held{reinterpret_cast<Unit*>(memory) + thread, rows * p.table.columns};

    Found statistics{};
    if (units > 0) statistics = fetch(part.units(p.x, place), place.row, rows, units, held);
    join_rows(part, place, works, statistics, channels, shared);
    join_channels(
        block, part,
        [&](int c) {
          const auto pixels = static_cast<double>(part.count * (V / K));
          const T(&of)[3] = channels[c].numbers;
          const double sum = of[1], distance = pixels > 0 ? sum / pixels : 0.;
          return Pair{of[0] + distance, of[2] - sum * distance};
        },
        [&](int i, const Pair& group) { found[i] = group; });
    __cluster_barrier_arrive(), __cluster_barrier_wait();

    const int64_t first_group = part.group(part.first_channel);
    const int groups = static_cast<int>(part.channels() / p.group_channels);
    for (int i = thread; i < groups; i += block.threads) {
      joined[i] = join_blocks(part, found + i);
      if (part.chunk == 0) {
        double* const stats = p.stats + 2 * (part.n * p.groups + first_group + i);
        stats[0] = joined[i].first, stats[1] = joined[i].second;
      }
    }
    __cluster_barrier_arrive();  // The other blocks' shared memory is not read any more.
    __syncthreads();
    for (int c = thread; c < part.channels(); c += block.threads) {
      const Pair group = joined[part.group(part.first_channel + c) - first_group];
      const int64_t channel = part.first_channel + c;
      // What is added to the input is subtracted from its mean.
      const Coefficient<T> one(p, channel, group.first - parameter(p.offset, channel, 0.), group.second);
      channels[c] = {{one.mean, one.a, one.b}};
    }
    __syncthreads();
    if (units > 0) {
      T mean[K], a[K], b[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T(&of)[3] = channels[place.column * K + k].numbers;
        mean[k] = of[0], a[k] = of[1], b[k] = of[2];
      }
      const auto y = part.units(p.out, place);
#pragma unroll 4
      for (int i = 0; i < units; ++i) {
        T values[V], result[V];
        held.load(i, values);
        apply(values, mean, a, b, result);
        y.store(place.row + i * rows, result);
      }
    }
    __cluster_barrier_wait();
  }
};

}  // namespace
}  // namespace group_norm_silu
}  // namespace litevae
