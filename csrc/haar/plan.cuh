// Divides a transform into passes of up to three levels, and picks the kernel of each. This is plain host
// code; `launch` runs a kernel.
#pragma once

#include "tile.cuh"

namespace litevae {
namespace haar {
namespace {

bool aligned(const Band& b, int64_t element, int64_t bytes, bool n, bool c, bool h, bool w) {
  const int64_t strides = (n ? b.n : 0) | (c ? b.c : 0) | (h ? b.h : 0) | (w ? b.w : 0);
  return ((static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data)) | strides * element) & (bytes - 1)) == 0;
}

struct Shape {
  int64_t batch, channels;
};

// Decides which kernel can run a pass. The stride of an axis of length 1 is never used, so it is not checked.
class Layouts {
 public:
  Layouts(const Pass& p, const Shape& shape) : p(p), shape(shape) {}

  Kind kind() const {
    if (shape.channels == 3 && coeffs_are_pixels(true)) {
      if (image_is_planar(true)) return Kind::pixels_planar;
      if (image_is_interleaved(true)) return Kind::pixels_interleaved;
    }
    if (image_is_planar(true) && coeffs_are_planar(true)) return Kind::planar;
    if (shape.channels % 2 == 0 && channels_come_in_pairs()) return Kind::channels;
    if (image_size() > 4 || coeff_size() > 4) return Kind::any;
    if (shape.channels == 3 && coeffs_are_pixels(false)) {
      if (image_is_planar(false)) return Kind::unaligned_planar;
      if (image_is_interleaved(false)) return Kind::unaligned_interleaved;
    }
    return image_is_planar(false) && coeffs_are_planar(false) ? Kind::rows : Kind::any;
  }

 private:
  int64_t image_size() const { return element_size(p.image_dtype); }
  int64_t coeff_size() const { return element_size(p.coeff_dtype); }
  int64_t height(int level) const { return (p.height + (int64_t{1} << level) - 1) >> level; }
  int64_t width(int level) const { return (p.width + (int64_t{1} << level) - 1) >> level; }
  // Whether vectors are aligned for every n and h, and with `c` and `w` for every channel and column.
  bool rows_fit(const Band& b, int64_t element, int level, int64_t bytes, bool c, bool w) const {
    return aligned(b, element, vector_bytes(bytes), shape.batch > 1, c && shape.channels > 1,
                   height(level) > 1, w && width(level) > 1);
  }

  // Kernels that use vectors take the strides of a level's H for all its bands.
  template <class Fits>
  bool each_band(const Fits& fits) const {
    for (int level = 1; level <= p.levels; ++level)
      for (const Band& b : p.bands[level - 1]) {
        const Band& h = p.bands[level - 1][kH];
        const bool same = (b.n == h.n || shape.batch == 1) && (b.c == h.c || shape.channels == 1) &&
                          (b.h == h.h || height(level) == 1) && (b.w == h.w || width(level) == 1);
        if (b.data != nullptr && (!same || !fits(b, level))) return false;
      }
    return true;
  }

  // Each of these says whether a row is contiguous, and if asked for, whether vectors are aligned in every
  // row.
  bool image_is_planar(bool fits) const {
    return p.image.w == 1 &&
           (!fits || rows_fit(p.image, image_size(), 0, kTileWidth * image_size(), true, false));
  }
  bool coeffs_are_planar(bool fits) const {
    return each_band([&](const Band& b, int level) {
      const int64_t run = (kTileWidth >> level) * coeff_size();
      return (b.w == 1 || width(level) == 1) && (!fits || rows_fit(b, coeff_size(), level, run, true, false));
    });
  }
  bool image_is_interleaved(bool fits) const {
    return p.image.c == 1 && p.image.w == 3 &&
           (!fits || rows_fit(p.image, image_size(), 0, 3 * kTileWidth * image_size(), false, false));
  }
  // Here, the 12 coefficients of a pixel are adjacent.
  bool coeffs_are_pixels(bool fits) const {
    for (int level = 0; level < p.levels; ++level)
      for (int band = 0; band < 4; ++band) {
        const char* ll = p.bands[level][kLL].data;
        if (ll == nullptr || p.bands[level][band].data != ll + band * 3 * coeff_size()) return false;
      }
    return each_band([&](const Band& b, int level) {
      const bool dense = b.c == 1 && (b.w == 12 || width(level) == 1);
      const int64_t run = 12 * (kTileWidth >> level) * coeff_size();
      const Band first{p.bands[level - 1][kLL].data, b.n, b.c, b.h, b.w};
      return dense && (!fits || rows_fit(first, coeff_size(), level, run, false, false));
    });
  }

  bool channels_come_in_pairs() const {
    return p.image.c == 1 && rows_fit(p.image, image_size(), 0, 2 * image_size(), false, true) &&
           each_band([&](const Band& b, int level) {
             return b.c == 1 && rows_fit(b, coeff_size(), level, 2 * coeff_size(), false, true);
           });
  }

  const Pass& p;
  const Shape& shape;
};

// Finds the tiles of an axis that lie inside: they are whole, and for synthesis they take no part in the fold
// of a missing sample at any level. If 2^levels divides the length, all level sizes are even and there is no
// fold. Otherwise the last tile is incomplete, and the fold goes to that tile; for reflect it may go to the
// tile before, and for periodic it goes to the first.
template <bool kAnalysis>
void inside(int64_t length, int64_t tile, const Pass& p, int64_t& first, int64_t& count) {
  int64_t end = length / tile;
  first = 0;
  if (!kAnalysis && length % (int64_t{1} << p.levels) != 0) {
    if (p.mode == Mode::reflect) --end;
    if (p.mode == Mode::periodic) first = 1;
  }
  count = end > first ? end - first : 0;
}

template <bool kAnalysis, class From, class T, Kind kKind, class Launch>
void launch_levels(const Pass& p, const Launch& launch) {
  switch (p.levels) {
    case 1:
      return launch(Inside<kAnalysis, From, T, 1, kKind>(), p);
    case 2:
      return launch(Inside<kAnalysis, From, T, 2, kKind>(), p);
    default:
      return launch(Inside<kAnalysis, From, T, 3, kKind>(), p);
  }
}

// `S` is the type to load in layouts that are worth a kernel per type. `Either` loads both 16-bit types.
template <bool kAnalysis, class S, class Either, class Launch>
void launch_kind(const Pass& p, Kind kind, const Launch& launch) {
  using Exact = Load<S>;
  switch (kind) {
    case Kind::rows:
      return launch_levels<kAnalysis, LoadRow<S>, float, Kind::rows>(p, launch);
    case Kind::planar:
      return launch_levels<kAnalysis, Exact, float, Kind::planar>(p, launch);
    case Kind::pixels_planar:
      return launch_levels<kAnalysis, Exact, float, Kind::pixels_planar>(p, launch);
    case Kind::pixels_interleaved:
      return launch_levels<kAnalysis, Exact, float, Kind::pixels_interleaved>(p, launch);
    case Kind::unaligned_planar:
      return launch_levels<kAnalysis, Exact, float, Kind::unaligned_planar>(p, launch);
    case Kind::unaligned_interleaved:
      return launch_levels<kAnalysis, Exact, float, Kind::unaligned_interleaved>(p, launch);
    case Kind::channels:
      return launch_levels<kAnalysis, Either, float, Kind::channels>(p, launch);
    default:
      return launch_levels<kAnalysis, Either, float, Kind::any>(p, launch);
  }
}

Band in_bytes(const Band& b, DType dtype) {
  const int64_t size = element_size(dtype);
  return {b.data, b.n * size, b.c * size, b.h * size, b.w * size};
}

template <bool kAnalysis, class Launch>
void run_pass(Pass p, const Shape& shape, bool in_double, const Launch& launch) {
  const int64_t tile_height = int64_t{1} << p.levels;
  p.tiles_x = (p.width + kTileWidth - 1) / kTileWidth, p.tiles_y = (p.height + tile_height - 1) / tile_height;
  inside<kAnalysis>(p.width, kTileWidth, p, p.x0, p.nx);
  inside<kAnalysis>(p.height, tile_height, p, p.y0, p.ny);

  const DType from = kAnalysis ? p.image_dtype : p.coeff_dtype;
  const Kind kind = Layouts(p, shape).kind();
  // Float64 that is mixed or not planar serves to check derivatives, so the slow path takes all of it.
  const bool all_slow = in_double && (kind != Kind::planar || p.image_dtype != p.coeff_dtype);
  if (p.nx == 0 || p.ny == 0 || all_slow) p.x0 = p.nx = p.y0 = p.ny = 0;
  const Band& to = kAnalysis ? p.bands[p.levels - 1][kH] : p.image;
  p.channels_first = shape.channels > 1 && to.c < to.w;

  p.image = in_bytes(p.image, p.image_dtype);
  p.carry = in_bytes(p.carry, in_double ? DType::f64 : DType::f32);
  for (auto& level : p.bands)
    for (Band& b : level) b = in_bytes(b, p.coeff_dtype);

  if (p.nx > 0) {
    p.channel_groups = shape.channels / lanes_of(kind);
    p.threads = shape.batch * p.channel_groups * p.nx * p.ny;
    if (in_double)
      launch_levels<kAnalysis, Load<double>, double, Kind::planar>(p, launch);
    else if (from == DType::f32)
      launch_kind<kAnalysis, float, Load<float>>(p, kind, launch);
    else if (from == DType::f16)
      launch_kind<kAnalysis, Half, LoadEither16>(p, kind, launch);
    else
      launch_kind<kAnalysis, BFloat16, LoadEither16>(p, kind, launch);
  }
  const int64_t edge_tiles = p.tiles_x * p.tiles_y - p.nx * p.ny;
  if (edge_tiles > 0) {
    p.channel_groups = shape.channels;
    p.edge_tiles = shape.batch * shape.channels * edge_tiles;
    int64_t positions = kAnalysis ? 0 : edge_positions(p.levels, 0);
    for (int level = 1; kAnalysis && level <= p.levels; ++level) positions += edge_positions(p.levels, level);
    p.threads = p.edge_tiles * positions;
    in_double ? launch(Edge<kAnalysis, double>(), p) : launch(Edge<kAnalysis, float>(), p);
  }
}

// `scratch` holds the LL between passes, that of every third level but the last, one after the other, in the
// type of the arithmetic.
template <bool kAnalysis, class Launch>
void run(const Transform& call, void* scratch, const Launch& launch) {
  constexpr int kPasses = (kMaxLevels + kPassLevels - 1) / kPassLevels;
  const bool in_double = call.image_dtype == DType::f64 || call.coeff_dtype == DType::f64;
  const DType carry_dtype = in_double ? DType::f64 : DType::f32;
  const Shape shape{call.batch, call.channels};
  Pass passes[kPasses] = {};
  int count = 0;

  Pass next{};
  next.height = call.height, next.width = call.width, next.image = call.image,
  next.image_dtype = call.image_dtype;
  next.mode = call.mode, next.factor = call.factor, next.coeff_dtype = call.coeff_dtype;
  char* free = static_cast<char*>(scratch);
  for (int level = 0; level < call.levels; level += kPassLevels) {
    Pass& p = passes[count++] = next;
    p.levels = call.levels - level < kPassLevels ? call.levels - level : kPassLevels;
    for (int i = 0; i < p.levels; ++i)
      for (int band = 0; band < 4; ++band) p.bands[i][band] = call.bands[level + i][band];
    if (level + p.levels == call.levels) break;

    const int64_t h = next.height = (p.height + 7) >> kPassLevels,
                  w = next.width = (p.width + 7) >> kPassLevels;
    const int64_t c = call.channels;
    const bool interleaved = c > 1 && call.image.c == 1 && call.image.w != 1;
    p.carry = interleaved ? Band{free, c * h * w, 1, c * w, c} : Band{free, c * h * w, h * w, w, 1};
    next.image = p.carry, next.image_dtype = carry_dtype;
    free += call.batch * c * h * w * element_size(carry_dtype);
  }

  if (kAnalysis)
    for (int i = 0; i < count; ++i) run_pass<kAnalysis>(passes[i], shape, in_double, launch);
  else
    for (int i = count - 1; i >= 0; --i) run_pass<kAnalysis>(passes[i], shape, in_double, launch);
}

}  // namespace
}  // namespace haar
}  // namespace litevae
