// The work of one GPU thread: one tile of the image, 8 pixels wide and 2^levels high, and all its
// coefficients, up to three levels deep. Tiles that cross the border or take part in an extension take a slow
// path, which follows every value through the levels separately.
#pragma once

#include "../common/device.cuh"
#include "haar.h"
#include "pairs.cuh"
#include "segments.cuh"

namespace litevae {
namespace haar {

constexpr int kPassLevels = 3;
constexpr int kTileWidth = 1 << kPassLevels;

// One launch: up to three levels of a transform. Kernels get strides in bytes, so that addresses do not
// depend on the element type.
struct Pass {
  int64_t threads;
  int64_t channel_groups;    // number of groups of channels; one thread handles one group
  int64_t x0, y0, nx, ny;    // first tile and number of tiles of the fast path
  int64_t tiles_x, tiles_y;  // number of all tiles; the slow path handles the others
  int64_t edge_tiles;        // number of tiles of the slow path, in all channels of all images
  bool channels_first;       // neighbouring threads take neighbouring channels rather than neighbouring tiles

  int64_t height, width;
  int levels;
  Mode mode;
  double factor;
  DType image_dtype, coeff_dtype;
  Band image;
  Band bands[kPassLevels][4];
  Band carry;  // the last level's LL, on its way to or from the next pass, in the arithmetic's type; may be
               // null
};

// Memory layout of the elements that a thread reads and writes.
enum class Kind {
  any,            // any strides: single elements
  planar,         // contiguous rows: vectors along a row
  channels,       // channels innermost, an even number of them: two channels per thread
  pixels_planar,  // three channels: contiguous rows in the image, the 12 coefficients of a pixel adjacent
  pixels_interleaved,  // three channels: channels innermost in the image and in the coefficients
  rows,                // contiguous rows that vectors do not fit: vectors with single elements around them
  unaligned_planar,    // pixels_planar and pixels_interleaved whose rows vectors do not fit
  unaligned_interleaved
};

LITEVAE_CONSTEXPR bool is_unaligned(Kind kind) {
  return kind == Kind::unaligned_planar || kind == Kind::unaligned_interleaved;
}
LITEVAE_CONSTEXPR bool is_interleaved(Kind kind) {
  return kind == Kind::pixels_interleaved || kind == Kind::unaligned_interleaved;
}

// Whether one thread takes all three channels of an image, and threads of a warp move rows together.
LITEVAE_CONSTEXPR bool is_pixels(Kind kind) {
  return is_interleaved(kind) || kind == Kind::pixels_planar || kind == Kind::unaligned_planar;
}

LITEVAE_CONSTEXPR int lanes_of(Kind kind) { return kind == Kind::channels ? 2 : is_pixels(kind) ? 3 : 1; }

namespace {

// The arithmetic uses float or double.
template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::f64 : DType::f32;

// --- Loads and stores of N adjacent elements.

template <class S>
struct Load {
  using Paired = PairedLoad<S>;
  using InSegments = SegmentLoad<S>;
  static constexpr bool kLoads = true;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(const char* at, T (&v)[N]) const {
    load_vector<S>(at, v);
  }
};

struct LoadEither16 {
  static constexpr bool kLoads = true;
  bool is_half;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(const char* at, T (&v)[N]) const {
    load_vector<Either16>(at, v, is_half);
  }
};

// A run of a row that vectors do not fit. `inner`: the runs on both sides belong to the row as well.
template <class S>
struct LoadRow {
  static constexpr bool kLoads = true;
  bool inner;
  template <int N, class T>
  LITEVAE_DEVICE void run(const char* at, T (&v)[N]) const {
    load_unaligned<S>(at, inner, v);
  }
};

template <class S>
struct Store {
  using Paired = PairedStore<S>;
  using InSegments = SegmentStore<S>;
  static constexpr bool kLoads = false;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(char* at, const T (&v)[N]) const {
    store_vector<S>(at, v);
  }
  template <int N, class T>
  LITEVAE_DEVICE void run(char* at, const T (&v)[N]) const {
    store_unaligned<S>(at, v);
  }
};

// Calls body with the Store of a type known at run time, which saves two thirds of the kernels. On the fast
// path float64 is stored only by kernels that compute in float64.
template <class T, class Body>
LITEVAE_DEVICE void with_store(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == 8)
    body(Store<double>());
  else if (dtype == DType::f32)
    body(Store<float>());
  else if (dtype == DType::f16)
    body(Store<Half>());
  else
    body(Store<BFloat16>());
}

// --- The position of a thread.

struct Place {
  int64_t n, c, y, x;  // c: first channel; y, x: tile
};

// Takes the innermost index, of an axis of length `size`, out of the flat index `rest`.
LITEVAE_DEVICE int64_t pop_index(int64_t& rest, int64_t size) {
  if (((rest | size) >> 32) == 0) {  // 32-bit division is much faster
    const uint32_t a = static_cast<uint32_t>(rest), b = static_cast<uint32_t>(size), quotient = a / b;
    rest = quotient;
    return a - quotient * b;
  }
  const int64_t quotient = rest / size, remainder = rest - quotient * size;
  rest = quotient;
  return remainder;
}

LITEVAE_DEVICE int64_t offset(const Band& b, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * b.n + c * b.c + y * b.h + x * b.w;
}

// --- Rows of N pixels. `first` is the first channel of the first pixel, and `b` has the strides.

template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_row(char* first, const Band& b, const Move& move, T (&v)[lanes_of(kKind)][N]) {
  constexpr int kLanes = lanes_of(kKind);
  if constexpr (kKind == Kind::planar || (is_pixels(kKind) && !is_interleaved(kKind))) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) move(first + k * b.c, v[k]);
  } else if constexpr (kKind == Kind::rows) {
    move.run(first, v[0]);
  } else if constexpr (is_interleaved(kKind)) {
    T flat[N * kLanes];
    if constexpr (Move::kLoads) move(first, flat);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        if constexpr (Move::kLoads)
          v[k][i] = flat[i * kLanes + k];
        else
          flat[i * kLanes + k] = v[k][i];
      }
    if constexpr (!Move::kLoads) move(first, flat);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T pixel[kLanes];
#pragma unroll
      for (int k = 0; k < kLanes; ++k) pixel[k] = v[k][i];
      move(first + i * b.w, pixel);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) v[k][i] = pixel[k];
    }
  }
}

// One position in each of the four sub-bands of a level. Their strides may differ only for Kind::any.
template <Kind kKind>
struct BandPlaces {
  const Band (&bands)[4];
  char* first[4];

  LITEVAE_DEVICE BandPlaces(const Band (&bands)[4], const Place& at, int64_t y, int64_t x) : bands(bands) {
#pragma unroll
    for (int band = 0; band < 4; ++band)
      first[band] = bands[band].data + offset(strides(band), at.n, at.c, y, x);
  }
  LITEVAE_DEVICE const Band& strides(int band) const { return bands[kKind == Kind::any ? band : int{kH}]; }
  LITEVAE_DEVICE char* row(int band, int r) const { return first[band] + r * strides(band).h; }
  LITEVAE_DEVICE bool has_ll() const { return bands[kLL].data != nullptr; }
};

// Moves row r of all four sub-bands, counted from `places`. Without an LL, a load leaves v[kLL] unchanged.
template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_bands(const BandPlaces<kKind>& places, int r, const Move& move,
                               T (&v)[4][lanes_of(kKind)][N]) {
  if constexpr (is_pixels(kKind)) {
    constexpr int kLanes = lanes_of(kKind), kPixel = 4 * kLanes;
    T flat[N * kPixel];
    if constexpr (Move::kLoads) move(places.row(kLL, r), flat);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int k = 0; k < kPixel; ++k) {
        if constexpr (Move::kLoads)
          v[k / kLanes][k % kLanes][i] = flat[i * kPixel + k];
        else
          flat[i * kPixel + k] = v[k / kLanes][k % kLanes][i];
      }
    if constexpr (!Move::kLoads) move(places.row(kLL, r), flat);
  } else {
#pragma unroll
    for (int band = kH; band <= kD; ++band)
      move_row<kKind>(places.row(band, r), places.strides(band), move, v[band]);
    if (places.has_ll()) move_row<kKind>(places.row(kLL, r), places.strides(kLL), move, v[kLL]);
  }
}

// The carry is small, so single elements are fast enough.
template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_carry(const Band& b, const Place& at, const Move& move, T (&v)[lanes_of(kKind)][N]) {
  constexpr int kLanes = lanes_of(kKind);
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T value[1] = {v[k][i]};
      move(b.data + offset(b, at.n, at.c + k, at.y, at.x * N + i), value);
      v[k][i] = value[0];
    }
}

// --- The fast path.

template <Kind kKind>
LITEVAE_DEVICE Place place_of(const Pass& p, int64_t thread) {
  constexpr int kLanes = lanes_of(kKind);
  Place at;
  const bool channels_first = kKind == Kind::channels || (kKind == Kind::any && p.channels_first);
  at.c = 0;
  if (channels_first) at.c = pop_index(thread, p.channel_groups);
  at.x = p.x0 + pop_index(thread, p.nx);
  at.y = p.y0 + pop_index(thread, p.ny);
  if (!channels_first) at.c = pop_index(thread, p.channel_groups);
  at.c *= kLanes;
  at.n = thread;
  return at;
}

// A tile is processed in groups of 2^kGroupLevels pixel rows: first all loads of a group, then its
// arithmetic, then all stores, whose type is looked up once. More loads in flight are faster until the values
// fill the registers.
template <int kLevels, Kind kKind>
constexpr int kGroupLevels = kLevels >= 2 && lanes_of(kKind) == 1 ? 2 : 1;

// Analysis: makes one row of a level's sub-bands, and `ll` once more, from two rows of the level below.
// Synthesis: makes the two rows from the sub-bands, to whose LL it adds `ll`. The butterfly is its own
// adjoint, so there its four results are the pixels.
template <bool kAnalysis, int kLanes, int N, class T>
LITEVAE_DEVICE void transform(T (&top)[kLanes][2 * N], T (&bottom)[kLanes][2 * N], T (&bands)[4][kLanes][N],
                              T (&ll)[kLanes][N], T factor) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T &a = top[k][2 * j], &b = top[k][2 * j + 1], &c = bottom[k][2 * j], &d = bottom[k][2 * j + 1];
      if constexpr (kAnalysis) {
        const Quad<T> quad = butterfly(a, b, c, d, factor);
        bands[kLL][k][j] = ll[k][j] = quad.ll;
        bands[kH][k][j] = quad.h, bands[kV][k][j] = quad.v, bands[kD][k][j] = quad.d;
      } else {
        const Quad<T> quad =
            butterfly(bands[kLL][k][j] + ll[k][j], bands[kH][k][j], bands[kV][k][j], bands[kD][k][j], factor);
        a = quad.ll, b = quad.h, c = quad.v, d = quad.d;
      }
    }
}

// Whether a thread stores several vectors of a row of the image.
template <bool kAnalysis, Kind kKind>
constexpr bool stores_planar_image = !kAnalysis && kKind == Kind::planar;

// One thread's tile in either direction. Analysis goes from the pixels up, and synthesis from the coarsest
// level down.
template <bool kAnalysis, class From, class T, int kLevels, Kind kKind>
struct Tile {
  static constexpr int kLanes = lanes_of(kKind), kGroup = kGroupLevels<kLevels, kKind>;
  template <int kLevel>
  using Row = T[kLanes][kTileWidth >> kLevel];

  const Pass& p;
  const From load;
  const T factor;
  const Place at;

  // How a warp's threads move rows together, where a row of each by itself would touch parts of sectors.
  template <class Move>
  LITEVAE_DEVICE auto together(const Move& move) const {
    if constexpr (is_unaligned(kKind))
      return typename Move::InSegments();
    else if constexpr (is_pixels(kKind))
      return typename Move::Paired();
    else
      return move;
  }
  template <class Move>
  LITEVAE_DEVICE auto image_together(const Move& move) const {
    if constexpr (stores_planar_image<kAnalysis, kKind>)
      return typename Move::Paired();
    else
      return together(move);
  }

  // Row i of the tile in a level's sub-bands.
  template <int kLevel>
  LITEVAE_DEVICE BandPlaces<kKind> places(int i) const {
    return {p.bands[kLevel - 1], at, at.y * (1 << (kLevels - kLevel)) + i, at.x * (kTileWidth >> kLevel)};
  }

  // Everything under row i of level kGroup; `ll` is that row of LL.
  LITEVAE_DEVICE void group(int i, Row<kGroup>(&ll)) const {
    constexpr int kRows = 1 << kGroup;
    Row<0> pixels[kRows];
    Row<1> level1[kRows / 2][4] = {};  // zeros stand for an LL that is not stored
    Row<2> level2[4] = {};
    char* const first =
        p.image.data + offset(p.image, at.n, at.c, at.y * (1 << kLevels) + i * kRows, at.x * kTileWidth);
    const BandPlaces<kKind> places1 = places<1>(i * kRows / 2), places2 = places<kGroup>(i);
    const auto image = [&](auto move) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        move_row<kKind>(first + r * p.image.h, p.image, image_together(move), pixels[r]);
    };
    const auto coefficients = [&](auto move) {
#pragma unroll
      for (int r = 0; r < kRows / 2; ++r) move_bands(places1, r, together(move), level1[r]);
      if constexpr (kGroup == 2) move_bands(places2, 0, together(move), level2);
    };

    if constexpr (kAnalysis)
      image(load);
    else
      coefficients(load);
    if constexpr (kGroup == 1) {
      transform<kAnalysis>(pixels[0], pixels[1], level1[0], ll, factor);
    } else {
      Row<1> ll1[2];
      if constexpr (!kAnalysis) transform<kAnalysis>(ll1[0], ll1[1], level2, ll, factor);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        transform<kAnalysis>(pixels[2 * r], pixels[2 * r + 1], level1[r], ll1[r], factor);
      if constexpr (kAnalysis) transform<kAnalysis>(ll1[0], ll1[1], level2, ll, factor);
    }
    if constexpr (kAnalysis)
      with_store<T>(p.coeff_dtype, coefficients);
    else
      with_store<T>(p.image_dtype, image);
  }

  // Everything under row i of level kLevel. `ll` is that row of LL: a result of analysis; for synthesis, what
  // the coarser levels add to the stored LL.
  template <int kLevel>
  LITEVAE_DEVICE void row(int i, Row<kLevel>(&ll)) const {
    if constexpr (kLevel == kGroup) {
      group(i, ll);
    } else {
      Row<kLevel - 1> top, bottom;
      Row<kLevel> bands[4] = {};
      if constexpr (!kAnalysis) {
        move_bands(places<kLevel>(i), 0, together(load), bands);
        transform<kAnalysis>(top, bottom, bands, ll, factor);
      }
      row<kLevel - 1>(2 * i, top);
      row<kLevel - 1>(2 * i + 1, bottom);
      if constexpr (kAnalysis) {
        transform<kAnalysis>(top, bottom, bands, ll, factor);
        const BandPlaces<kKind> to = places<kLevel>(i);
        with_store<T>(p.coeff_dtype, [&](auto store) { move_bands(to, 0, together(store), bands); });
      }
    }
  }

  LITEVAE_DEVICE void run() const {
    const bool has_carry = kLevels == kPassLevels && p.carry.data != nullptr;
    Row<kLevels> ll = {};
    if (!kAnalysis && has_carry) move_carry<kKind>(p.carry, at, Load<T>(), ll);
    row<kLevels>(0, ll);
    if (kAnalysis && has_carry) move_carry<kKind>(p.carry, at, Store<T>(), ll);
  }
};

// --- The slow path. It rarely runs, so its functions are not inlined, which keeps the code small.

template <class T>
LITEVAE_DEVICE_CALL T load_one(const Band& b, DType dtype, int64_t n, int64_t c, int64_t y, int64_t x) {
  const char* at = b.data + offset(b, n, c, y, x);
  T value[1] = {};
  switch (dtype) {
    case DType::f32:
      Load<float>()(at, value);
      break;
    case DType::f64:
      Load<double>()(at, value);
      break;
    case DType::f16:
      Load<Half>()(at, value);
      break;
    case DType::bf16:
      Load<BFloat16>()(at, value);
      break;
  }
  return value[0];
}

template <class T>
LITEVAE_DEVICE_CALL void store_one(const Band& b, DType dtype, int64_t n, int64_t c, int64_t y, int64_t x,
                                   T value) {
  const T run[1] = {value};
  char* at = b.data + offset(b, n, c, y, x);
  if (dtype == DType::f64)
    Store<double>()(at, run);
  else
    with_store<float>(dtype, [&](auto store) { store(at, run); });
}

// The size of an axis after `level` halvings.
LITEVAE_DEVICE int64_t size_at(int64_t n, int level) { return (n + (int64_t{1} << level) - 1) >> level; }

// Index of the stored sample at position i of an axis of length n; -1: the sample is zero.
LITEVAE_DEVICE int64_t source(int64_t i, int64_t n, Mode mode) { return i < n ? i : extension(n, mode); }

template <class T, int kLevel>
LITEVAE_DEVICE_CALL Quad<T> pull_quad(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x);

// A level's LL at y, x, computed from the image.
template <class T, int kLevel>
LITEVAE_DEVICE T pull_ll(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  if (y < 0 || x < 0) return 0;
  if constexpr (kLevel == 0)
    return load_one<T>(p.image, p.image_dtype, n, c, y, x);
  else
    return pull_quad<T, kLevel>(p, n, c, y, x).ll;
}

template <class T, int kLevel>
LITEVAE_DEVICE_CALL Quad<T> pull_quad(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  const int64_t bottom = source(2 * y + 1, size_at(p.height, kLevel - 1), p.mode);
  const int64_t right = source(2 * x + 1, size_at(p.width, kLevel - 1), p.mode);
  return butterfly(pull_ll<T, kLevel - 1>(p, n, c, 2 * y, 2 * x),
                   pull_ll<T, kLevel - 1>(p, n, c, 2 * y, right),
                   pull_ll<T, kLevel - 1>(p, n, c, bottom, 2 * x),
                   pull_ll<T, kLevel - 1>(p, n, c, bottom, right), static_cast<T>(p.factor));
}

// Stores the coefficients of a level at y, x, if that is inside the level.
template <class T, int kLevel>
LITEVAE_DEVICE void pull_bands(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  if (y >= size_at(p.height, kLevel) || x >= size_at(p.width, kLevel)) return;
  const Quad<T> q = pull_quad<T, kLevel>(p, n, c, y, x);
  const Band(&bands)[4] = p.bands[kLevel - 1];
  if (bands[kLL].data != nullptr) store_one(bands[kLL], p.coeff_dtype, n, c, y, x, q.ll);
  store_one(bands[kH], p.coeff_dtype, n, c, y, x, q.h);
  store_one(bands[kV], p.coeff_dtype, n, c, y, x, q.v);
  store_one(bands[kD], p.coeff_dtype, n, c, y, x, q.d);
  if (kLevel == p.levels && p.carry.data != nullptr) store_one(p.carry, kDTypeOf<T>, n, c, y, x, q.ll);
}

template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_pixel(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x);

// The share that the coefficients of level kLevel + 1 have in position y, x of level kLevel's LL (level 0:
// the image). The position may be one past the end.
template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_share(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  const Band(&bands)[4] = p.bands[kLevel];
  const int64_t i = y / 2, j = x / 2;
  T ll = 0;
  if (bands[kLL].data != nullptr) ll = load_one<T>(bands[kLL], p.coeff_dtype, n, c, i, j);
  if (kLevel + 1 == p.levels) {
    if (p.carry.data != nullptr) ll += load_one<T>(p.carry, kDTypeOf<T>, n, c, i, j);
  } else if constexpr (kLevel + 1 < kPassLevels) {
    ll += pull_pixel<T, kLevel + 1>(p, n, c, i, j);
  }
  const Quad<T> q = butterfly(ll, load_one<T>(bands[kH], p.coeff_dtype, n, c, i, j),
                              load_one<T>(bands[kV], p.coeff_dtype, n, c, i, j),
                              load_one<T>(bands[kD], p.coeff_dtype, n, c, i, j), static_cast<T>(p.factor));
  return y % 2 == 0 ? (x % 2 == 0 ? q.ll : q.h) : (x % 2 == 0 ? q.v : q.d);
}

// Position y, x of level kLevel's LL: its own share, and the shares of the missing samples that it replaces.
template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_pixel(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  const int64_t height = size_at(p.height, kLevel), width = size_at(p.width, kLevel);
  const bool fold_y = height % 2 != 0 && extension(height, p.mode) == y;
  const bool fold_x = width % 2 != 0 && extension(width, p.mode) == x;
  T value = pull_share<T, kLevel>(p, n, c, y, x);
  if (fold_x) value += pull_share<T, kLevel>(p, n, c, y, width);
  if (fold_y) {
    T missing = pull_share<T, kLevel>(p, n, c, height, x);
    if (fold_x) missing += pull_share<T, kLevel>(p, n, c, height, width);
    value += missing;
  }
  return value;
}

// The number of positions of a level in a tile of the slow path.
LITEVAE_CONSTEXPR int64_t edge_positions(int levels, int level) {
  return (int64_t{1} << (levels - level)) * (kTileWidth >> level);
}

// `thread` is the tile, in all channels unless `c` says which.
LITEVAE_DEVICE Place edge_place_of(const Pass& p, int64_t thread, int64_t c) {
  Place at;
  const int64_t full_rows = p.tiles_y - p.ny;
  int64_t edge = pop_index(thread, p.tiles_x * p.tiles_y - p.nx * p.ny);
  if (edge < full_rows * p.tiles_x) {
    at.x = pop_index(edge, p.tiles_x);
    at.y = edge < p.y0 ? edge : edge + p.ny;
  } else {
    edge -= full_rows * p.tiles_x;
    at.x = pop_index(edge, p.tiles_x - p.nx);
    if (at.x >= p.x0) at.x += p.nx;
    at.y = p.y0 + edge;
  }
  at.c = p.channels_first ? c : pop_index(thread, p.channel_groups);
  at.n = thread;
  return at;
}

// --- The kernels: one type each.

template <bool kIsAnalysis, class From, class T, int kLevels, Kind kKind>
struct Inside {
  static constexpr bool kAnalysis = kIsAnalysis;
  static constexpr bool kTogether = is_pixels(kKind) || stores_planar_image<kAnalysis, kKind>;
  static LITEVAE_DEVICE void run(const Pass& p, int64_t thread) {
    const Place at = place_of<kKind>(p, thread);
    Tile<kAnalysis, From, T, kLevels, kKind>{p, load_of(p, at), static_cast<T>(p.factor), at}.run();
  }

 private:
  static LITEVAE_DEVICE From load_of(const Pass& p, const Place& at) {
    if constexpr (std::is_same<From, LoadEither16>::value)
      return LoadEither16{(kAnalysis ? p.image_dtype : p.coeff_dtype) == DType::f16};
    else if constexpr (kKind == Kind::rows)
      return From{at.x > 0 && at.x + 1 < p.width / kTileWidth};
    else
      return From();
  }
};

// A thread makes one position of one level, so that the loads of a tile are spread over many threads.
template <bool kIsAnalysis, class T>
struct Edge {
  static constexpr bool kAnalysis = kIsAnalysis, kTogether = false;
  static LITEVAE_DEVICE void run(const Pass& p, int64_t thread) {
    if constexpr (kAnalysis) {
      level<1>(p, thread);
    } else {
      const Position at = position(p, thread, 0);
      if (at.y < p.height && at.x < p.width)
        store_one(p.image, p.image_dtype, at.n, at.c, at.y, at.x,
                  pull_pixel<T, 0>(p, at.n, at.c, at.y, at.x));
    }
  }

 private:
  struct Position {
    int64_t n, c, y, x;
  };

  static LITEVAE_DEVICE Position position(const Pass& p, int64_t thread, int level) {
    const int width = kTileWidth >> level, height = 1 << (p.levels - level);
    const int64_t c = p.channels_first ? pop_index(thread, p.channel_groups) : 0;
    const int64_t inside_x = pop_index(thread, width), inside_y = pop_index(thread, height);
    const Place at = edge_place_of(p, thread, c);
    return {at.n, at.c, at.y * height + inside_y, at.x * width + inside_x};
  }

  // The threads of level 1 come first, then those of the others: those of a warp do the same work.
  template <int kLevel>
  static LITEVAE_DEVICE void level(const Pass& p, int64_t thread) {
    const int64_t threads = edge_positions(p.levels, kLevel) * p.edge_tiles;
    if (thread < threads) {
      const Position at = position(p, thread, kLevel);
      pull_bands<T, kLevel>(p, at.n, at.c, at.y, at.x);
    } else if constexpr (kLevel < kPassLevels) {
      level<kLevel + 1>(p, thread - threads);
    }
  }
};

}  // namespace
}  // namespace haar
}  // namespace litevae
