// Adds biases and residuals to a tensor in one pass, which also measures each channel of the sum for the norm
// that follows. kernels.cuh explains the words.
//
// Add writes the sum and, where statistics are wanted, the mean and the sum of squared deviations of each
// channel in each chunk. JoinChunks computes the statistics of each channel.
#pragma once

#include "plan.cuh"

namespace litevae {
namespace group_norm_silu {
namespace {

// The arguments of one launch. x is the tensor to add to, and `stats` has the statistics (N, C, 2).
struct Terms : Pass {
  Strided residuals[2][2];  // the second part of each is empty
  Strided biases[2];
};

template <class S, Kind kKind, bool kMeasure>
struct Add {
  using Part =
      group_norm_silu::Part<std::conditional_t<std::is_same<S, double>::value, AnyTypeInDouble, S>, kKind>;
  using T = typename Part::T;
  static constexpr int V = Part::V, K = Part::K, kBatch = 4;
  static constexpr int kMaxThreads = kThreads, kMinBlocks = kMeasure ? 4 : 5;
  using Found = Moments<T, K>;
  struct Shared {
    T bias[kThreads];
    Found rows[kMeasure ? kThreads : 1];
  };

  // Adds to a thread's units, and returns the statistics of the sums.
  static LITEVAE_DEVICE Found add(const Terms& p, const Part& part, const T (&biases)[kThreads], int thread,
                                  const typename Part::Place& place) {
    if (!part.has(thread, place)) return Found{};
    const auto y = part.units(p.x, place);
    const typename Part::Units residuals[] = {part.units(p.residuals[0], place),
                                              part.units(p.residuals[1], place)};
    const int rows = p.table.rows, end = part.count;
    T bias[K];
#pragma unroll
    for (int k = 0; k < K; ++k) bias[k] = biases[place.column * K + k];
    Deviations<Part> found;
#pragma unroll 1
    for (int unit = place.row; unit < end; unit += kBatch * rows) {
      typename Part::Unit sums[kBatch], others[kBatch][2];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (unit + u * rows >= end) break;
        // The read-only path is not for y, nor for a residual that is y.
        sums[u] = y.template load<Memory::written>(unit + u * rows);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (p.residuals[i][0].data != nullptr)
            others[u][i] = residuals[i].template load<Memory::written>(unit + u * rows);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (unit + u * rows >= end) break;
        // y comes last, as in Triton, so that the sums have the same bits.
        T sum[V], values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = bias[K == 1 ? 0 : v];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (p.residuals[i][0].data == nullptr) continue;
          others[u][i].unpack(values);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += values[v];
        }
        sums[u].unpack(values);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += values[v];
        y.store(unit + u * rows, sum);
        if constexpr (kMeasure) sums[u].pack(sum, y.dtype);
      }
      if constexpr (kMeasure) found.template add<kBatch>(sums, unit, rows, end);
    }
    return found.moments();
  }

  static LITEVAE_DEVICE void run(const Terms& p, int64_t index, const Block& block, Shared& shared) {
    const Part part(p, index);
    block.each([&](int thread) {
      for (int i = thread; i < part.channels(); i += block.threads) {
        T bias = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          bias += static_cast<T>(parameter(p.biases[j], part.first_channel + i, 0.));
        shared.bias[i] = bias;
      }
    });
    const auto add_units = [&](int thread, const typename Part::Place& place) {
      return add(p, part, shared.bias, thread, place);
    };
    if constexpr (kMeasure)
      join_rows(block, part, shared.rows, add_units, [&](int i, double mean, T squares) {
        part.partial(i) = {mean, static_cast<double>(squares)};
      });
    else
      block.each([&](int thread) { add_units(thread, part.place(thread)); });
  }
};

// A block works on kParameterColumns channels of one image.
struct JoinChunks {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 1;
  struct Shared {
    double values[2][kThreads], sums[kThreads];
  };

  static LITEVAE_DEVICE void run(const Pass& p, int64_t index, const Block& block, Shared& shared) {
    int64_t n = index;
    const int64_t first =
        take(n, (p.channels + kParameterColumns - 1) / kParameterColumns) * kParameterColumns;
    const Table table = Table::of(block, kParameterColumns);
    const Pair* const partial = p.partial + n * p.chunks * p.channels + first;
    block.each([&](int thread) {
      const int column = table.column(thread);
      double sum = 0, squares = 0;
      if (first + column < p.channels)
        add_chunks(p, partial + column, 1., partial[column].first, table.row(thread), table.rows, sum,
                   squares);
      shared.values[0][thread] = sum, shared.values[1][thread] = squares;
    });
    add_rows(block, table, shared.values, shared.sums);
    block.each([&](int thread) {
      if (thread >= kParameterColumns || first + thread >= p.channels) return;
      const Pair both =
          mean_and_variance(partial[thread].first, shared.sums[thread],
                            shared.sums[kParameterColumns + thread], static_cast<double>(p.pixels));
      double* const to = p.stats + 2 * (n * p.channels + first + thread);
      to[0] = both.first, to[1] = both.second;
    });
  }
};

template <class S, Kind kKind>
using AddOnly = Add<S, kKind, false>;
template <class S, Kind kKind>
using AddAndMeasure = Add<S, kKind, true>;

// `scratch` has scratch_bytes() bytes and is aligned to 16 bytes; it is unused without statistics.
template <class Launch>
void run(const Addition& call, void* scratch, const Launch& launch) {
  Inputs in{};
  in.x = call.y, in.stats = call.statistics, in.groups = 1;
  Terms p{pass_of(in), {}, {}};
  if (p.batch * p.channels * p.pixels == 0) return;
  const DType dtype = call.y.dtype;
  Strided(*tensors[3])[2] = {&p.x};
  int count = 1;
  bool same_dtype = true;
  for (int i = 0; i < 2; ++i) {
    p.biases[i] = in_bytes(call.biases[i]);
    if (call.residuals[i].data == nullptr) continue;
    p.residuals[i][0] = in_bytes(call.residuals[i]);
    same_dtype = same_dtype && call.residuals[i].dtype == dtype;
    tensors[count++] = &p.residuals[i];
  }
  Kind kind = choose(p, call.y, tensors, count);
  if (!same_dtype) kind = Kind::single;
  if (p.stats == nullptr) {
    divide(p, dtype, kind, Work::write);
    return launch_streaming<AddOnly>(p, dtype, kind, launch);
  }
  divide(p, dtype, kind, Work::sum);
  place(p, scratch);
  launch_streaming<AddAndMeasure>(p, dtype, kind, launch);
  p.blocks = p.batch * ((p.channels + kParameterColumns - 1) / kParameterColumns), p.threads = kThreads;
  launch(JoinChunks(), static_cast<const Pass&>(p));
}

}  // namespace
}  // namespace group_norm_silu
}  // namespace litevae
