// Divides GroupNorm+SiLU among thread blocks and picks the kernels; kernels.cuh explains the words. This is
// plain host code. The argument `launch` runs a kernel.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "kernels.cuh"

namespace litevae {
namespace group_norm_silu {
namespace {

// --- The division of a tensor. It depends on the shape alone, so that every GPU gives the same bits.

struct Division {
  Table table;
  int64_t slabs, chunks, chunk;
};

// What a pass does with a chunk.
enum class Work {
  sum,   // writes a result of each chunk: few, so that the results are few
  write  // writes a tensor
};

// `columns` and `units` count units along the channels and along the pixels.
Division divide_work(int64_t batch, int64_t columns, int64_t units, bool channels_first, Work work) {
  // 16 units are 256 bytes. More would leave fewer pixels per block, and more results to add up.
  constexpr int64_t kMaxColumns = 16;
  // The most units per thread that leave enough blocks to fill the largest GPUs. A thread that sums has eight
  // if there are as many, which it loads at once, so that the results have a thirtieth of the tensor's size.
  struct Choice {
    int64_t units, blocks;
  };
  constexpr Choice kSums[] = {{32, 4096}, {16, 264}, {8, 0}, {8, 0}, {8, 0}};
  constexpr Choice kWrites[] = {{32, 4096}, {16, 512}, {8, 264}, {4, 132}, {2, 0}};
  const auto& choices = work == Work::sum ? kSums : kWrites;
  Division result;
  int64_t width, rows;
  if (channels_first) {
    result.slabs = (columns + kMaxColumns - 1) / kMaxColumns;
    width = (columns + result.slabs - 1) / result.slabs;
    rows = std::min(kThreads / width, units);
  } else {
    rows = 16;
    while (rows < kThreads && rows * choices[4].units < units) rows *= 2;
    rows = std::min(rows, units);
    width = std::min(kThreads / rows, columns);
  }
  result.slabs = (columns + width - 1) / width;
  result.table = {static_cast<int>(width), static_cast<int>(rows),
                  channels_first ? 1 : static_cast<int>(rows), channels_first ? static_cast<int>(width) : 1};
  for (const Choice& choice : choices) {
    result.chunks = (units + rows * choice.units - 1) / (rows * choice.units);
    if (batch * result.slabs * result.chunks >= choice.blocks) break;
  }
  const int64_t per_row = (units + rows * result.chunks - 1) / (rows * result.chunks);
  result.chunk = rows * per_row;
  result.chunks = (units + result.chunk - 1) / result.chunk;
  return result;
}

// Returns the bytes of scratch memory that a call needs at most, whatever the strides. They hold the results
// of the chunks and, as large as two more chunks, the coefficients of the channels or, backward, the sums of
// whole channels and groups.
int64_t scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element) {
  int64_t chunks = 0;
  for (const int64_t lanes : {int64_t{1}, 16 / element})
    for (const bool channels_first : {false, true}) {
      const int64_t along_channels = channels_first ? lanes : 1, along_pixels = channels_first ? 1 : lanes;
      if (channels % along_channels != 0 || pixels % along_pixels != 0 || batch * channels * pixels == 0)
        continue;
      const int64_t columns = channels / along_channels, units = pixels / along_pixels;
      chunks = std::max(chunks, divide_work(batch, columns, units, channels_first, Work::sum).chunks);
    }
  return batch * channels * (chunks + 2) * static_cast<int64_t>(sizeof(Pair));
}

// --- The choice of kernels.

class Layout {
 public:
  Layout(const Pass& p, int64_t element) : p(p), lanes(16 / element), element(element) {}

  // Returns the kind that serves `count` tensors, each with its x and its skip part.
  Kind kind(const Strided (*const* tensors)[2], int count) const {
    if (!p.flat || lanes == 2) return Kind::single;
    bool channels = true, pixels = p.pixels % lanes == 0;
    for (int i = 0; i < count; ++i)
      for (int part = 0; part < 2; ++part) {
        const Strided& t = (*tensors[i])[part];
        const int64_t size = part == 0 ? p.x_channels : p.channels - p.x_channels;
        if (size == 0) continue;
        channels = channels && size % lanes == 0 && t.c == element && aligned(t, p.pixels > 1 ? t.w : 0) &&
                   std::abs(t.w) < int64_t{1} << 31;
        pixels = pixels && t.w == element && aligned(t, size > 1 ? t.c : 0);
      }
    return channels ? Kind::channels : pixels ? Kind::pixels : Kind::single;
  }

 private:
  bool aligned(const Strided& t, int64_t stride) const {
    const int64_t strides = stride | (p.batch > 1 ? t.n : 0);
    return ((static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data)) | strides) & 15) == 0;
  }

  const Pass& p;
  const int64_t lanes, element;
};

// Splits a tensor that has all channels into its x and its skip part.
void split(const TensorView& t, int64_t x_channels, Strided (&parts)[2]) {
  parts[0] = parts[1] = in_bytes(t);
  parts[1].data += x_channels * parts[1].c;
}

Pass pass_of(const Inputs& in) {
  Pass p{};
  p.x[0] = in_bytes(in.x);
  if (in.skip.data != nullptr) p.x[1] = in_bytes(in.skip);
  p.x_channels = in.x.size[1];
  p.batch = in.batch(), p.channels = in.channels(), p.pixels = in.height() * in.width();
  p.width = in.width();
  p.groups = in.groups, p.group_channels = p.channels / p.groups;
  p.weight = in_bytes(in.weight), p.bias = in_bytes(in.bias), p.offset = in_bytes(in.offset);
  p.by_group = Divider::of(p.group_channels, p.channels);
  p.stats = in.stats;
  return p;
}

// Returns the kind of kernel that serves `count` tensors of the dtype, the height and the width of `x`.
Kind choose(Pass& p, const TensorView& x, Strided (*const* tensors)[2], int count) {
  p.flat = true;
  for (int i = 0; i < count; ++i)
    for (Strided& t : *tensors[i])
      if (t.data != nullptr && !flatten(t, x.size[2], x.size[3])) p.flat = false;
  return Layout(p, element_size(x.dtype)).kind(tensors, count);
}

// Returns the kind of kernel that serves a call.
Kind choose(Pass& p, const Inputs& in, bool backward) {
  Strided(*const tensors[])[2] = {&p.x, &p.out, &p.grad};
  return choose(p, in.x, tensors, backward ? 3 : 2);
}

// Returns whether neighbouring threads take neighbouring channels, and not neighbouring pixels.
bool channels_come_first(const Pass& p, Kind kind) {
  if (kind != Kind::single) return kind == Kind::channels;
  return p.channels > 1 && (p.pixels == 1 || p.x[0].c < p.x[0].w);
}

void divide(Pass& p, DType dtype, Kind kind, Work work) {
  const bool channels_first = channels_come_first(p, kind);
  const int64_t lanes = kind == Kind::single ? 1 : 16 / element_size(dtype);
  const int64_t along_pixels = kind == Kind::pixels ? lanes : 1, along_channels = lanes / along_pixels;
  const Division how =
      divide_work(p.batch, p.channels / along_channels, p.pixels / along_pixels, channels_first, work);
  p.table = how.table, p.slabs = how.slabs, p.chunks = how.chunks, p.chunk = how.chunk;
  p.slab = how.table.columns * along_channels;
  p.blocks = p.batch * p.slabs * p.chunks;
  p.by_row = Divider::of(channels_first ? how.table.columns : how.table.rows, kThreads);
  p.inner = Divider::of(channels_first ? p.slabs : p.chunks, p.blocks);
  p.outer = Divider::of(channels_first ? p.chunks : p.slabs, p.blocks);
  p.chunk_pixels = static_cast<double>(how.chunk * along_pixels);
  p.last_pixels = static_cast<double>(p.pixels - (how.chunks - 1) * how.chunk * along_pixels);
}

// Divides the work among thread-block clusters, each of which keeps whole groups of an image in the shared
// memory of its blocks; returns false if clusters cannot serve the call or are unlikely to pay. The result
// depends on the card as well as on the shape.
bool divide_among_clusters(Pass& p, DType dtype, Kind kind, const Card& card) {
  // A block with fewer bytes has less than two units per thread, whose sums take longer than its loads.
  constexpr int64_t kFewBytes = 2 * 16 * kClusterThreads;
  // An SM moves about 100 bytes per nanosecond. If most SMs are idle, this many bytes per block take as long,
  // in and out, as the two launches that a cluster saves and the three passes of a full card.
  constexpr int64_t kManyBytes = 128 * 1024;
  const bool channels_first = channels_come_first(p, kind);
  const int64_t element = element_size(dtype), wide = dtype == DType::f64 ? 8 : 4;
  const int64_t lanes = kind == Kind::single ? 1 : 16 / element, unit = kind == Kind::single ? wide : 16;
  const int64_t along_channels = kind == Kind::channels ? lanes : 1, along_pixels = lanes / along_channels;
  const int64_t columns = p.channels / along_channels, units = p.pixels / along_pixels;
  const auto parts = [](int64_t of, int64_t size) { return (of + size - 1) / size; };

  // The smallest slab has whole groups and, if channels are innermost, whole sectors of 32 bytes.
  int64_t width = std::lcm(p.group_channels, along_channels);
  if (channels_first) width = std::lcm(width * element, int64_t{32}) / element;
  width = std::min(width / along_channels, columns);
  if (width > kClusterThreads) return false;
  const auto clusters = [&] { return p.batch * parts(columns, width); };
  const auto bytes = [&](int64_t blocks) { return parts(units, blocks) * width * unit; };
  while (2 * width <= std::min<int64_t>(columns, kClusterThreads) && bytes(1) < kFewBytes &&
         clusters() >= 4 * card.multiprocessors)
    width *= 2;

  // Sets the numbers for `blocks` per cluster, and returns whether these fit the shared memory.
  const auto fits = [&](int64_t blocks) {
    const int64_t rows = std::min(kClusterThreads / width, parts(units, blocks));
    p.table = {static_cast<int>(width), static_cast<int>(rows), channels_first ? 1 : static_cast<int>(rows),
               channels_first ? static_cast<int>(width) : 1};
    p.chunks = blocks, p.chunk = rows * parts(units, blocks * rows), p.slab = width * along_channels;
    const auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
    const int64_t held = aligned(p.chunk * width * unit), channels = held + aligned(3 * wide * p.slab),
                  groups = channels + 2 * static_cast<int64_t>(sizeof(Pair)) * (p.slab / p.group_channels);
    const int64_t sums = wide * along_channels * kClusterThreads;
    if (groups + sums > card.shared) return false;
    p.channels_at = static_cast<int>(held), p.groups_at = static_cast<int>(channels);
    p.shared = static_cast<int>(groups);
    return true;
  };
  int64_t blocks = 1;
  while (blocks <= card.blocks && !fits(blocks)) blocks *= 2;
  // A cluster may use more SMs than it needs while there are some.
  while (2 * blocks <= card.blocks && clusters() * blocks < card.multiprocessors && bytes(blocks) > kFewBytes)
    blocks *= 2;
  if (blocks > card.blocks || !fits(blocks)) return false;
  if (2 * clusters() * blocks < card.multiprocessors && bytes(blocks) > kManyBytes) return false;

  p.slabs = parts(columns, width);
  p.blocks = clusters() * blocks;
  p.by_row = Divider::of(channels_first ? width : p.table.rows, kClusterThreads);
  p.inner = Divider::of(p.chunks, p.blocks), p.outer = Divider::of(p.slabs, p.blocks);
  return true;
}

// Divides the scratch memory, after the work.
void place(Pass& p, void* scratch) {
  p.partial = static_cast<Pair*>(scratch);
  p.sums = p.partial + p.batch * p.chunks * p.channels;
  p.group_means = p.sums + p.batch * p.channels;
  p.coefficients = p.sums;
}

// --- Launches.

template <template <class, Kind> class Body, class AnyPass, class Launch>
void launch_streaming(AnyPass& p, DType dtype, Kind kind, const Launch& launch) {
  p.blocks = p.batch * p.slabs * p.chunks;
  p.threads = (p.table.columns * p.table.rows + 31) / 32 * 32;
  if (dtype == DType::f64) return launch(Body<double, Kind::single>(), p);
  if (kind == Kind::single) return launch(Body<AnyType, Kind::single>(), p);
  const bool channels = kind == Kind::channels;
  if (dtype == DType::f32)
    channels ? launch(Body<float, Kind::channels>(), p) : launch(Body<float, Kind::pixels>(), p);
  else if (dtype == DType::f16)
    channels ? launch(Body<Half, Kind::channels>(), p) : launch(Body<Half, Kind::pixels>(), p);
  else
    channels ? launch(Body<BFloat16, Kind::channels>(), p) : launch(Body<BFloat16, Kind::pixels>(), p);
}

template <class Body, class Launch>
void launch_groups(Pass& p, const Launch& launch) {
  p.blocks = p.batch * p.groups;
  p.threads = 32;
  while (p.threads < kReduceThreads && 4 * p.threads < p.chunks * p.group_channels) p.threads *= 2;
  launch(Body(), p);
}

// Returns the arguments of the forward kernels, before the division.
Pass pass_of(const Forward& call) {
  Pass p = pass_of(call.in);
  split(call.y, p.x_channels, p.out);
  p.eps = call.eps;
  p.is_double = call.in.x.dtype == DType::f64;
  return p;
}

// `scratch` has scratch_bytes() bytes and is aligned to 16 bytes.
template <class Launch>
void run(const Forward& call, void* scratch, const Launch& launch) {
  Pass p = pass_of(call);
  if (p.batch * p.channels * p.pixels == 0) return;
  const Kind kind = choose(p, call.in, false);
  divide(p, call.in.x.dtype, kind, Work::sum);
  place(p, scratch);
  p.given[0] = call.given[0], p.given[1] = call.given[1];
  if (p.given[0] != nullptr) {
    p.chunks = 1;
    launch_groups<CombineChannels>(p, launch);
  } else {
    launch_streaming<Statistics>(p, call.in.x.dtype, kind, launch);
    launch_groups<Combine>(p, launch);
  }
  divide(p, call.in.x.dtype, kind, Work::write);
  launch_streaming<Apply>(p, call.in.x.dtype, kind, launch);
}

template <class Launch>
void run(const Backward& call, void* scratch, const Launch& launch) {
  Pass p = pass_of(call.in);
  if (p.batch * p.channels * p.pixels == 0) return;
  split(call.grad, p.x_channels, p.grad);
  p.out[0] = in_bytes(call.grad_x);
  if (call.grad_skip.data != nullptr) p.out[1] = in_bytes(call.grad_skip);
  p.grad_weight = in_bytes(call.grad_weight), p.grad_bias = in_bytes(call.grad_bias);
  const Kind kind = choose(p, call.in, true);
  divide(p, call.in.x.dtype, kind, Work::sum);
  place(p, scratch);
  launch_streaming<Sums>(p, call.in.x.dtype, kind, launch);
  launch_groups<Reduce>(p, launch);
  divide(p, call.in.x.dtype, kind, Work::write);
  launch_streaming<ApplyBackward>(p, call.in.x.dtype, kind, launch);
  if (p.grad_weight.data == nullptr && p.grad_bias.data == nullptr) return;
  p.blocks = (p.channels + kParameterColumns - 1) / kParameterColumns, p.threads = kThreads;
  launch(Parameters(), p);
}

}  // namespace
}  // namespace group_norm_silu
}  // namespace litevae
