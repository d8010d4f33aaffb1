// What one GPU thread does: one tile of the image, 8 pixels wide and 2^levels high, and all its coefficients,
// up to three levels deep. Tiles that reach over the border or take part in an extension go through a slow
// path of their own, which follows every value through the levels by itself.
#pragma once

#include "../common/device.cuh"
#include "haar.h"

namespace litevae {
namespace haar {

constexpr int kPassLevels = 3;
constexpr int kTileWidth = 1 << kPassLevels;

// One launch: up to three levels of a transform. Strides are in bytes when kernels see them: addresses then
// do not depend on the element type.
struct Pass {
  int64_t threads;
  int64_t channel_groups;    // what one thread handles of the channels, and how many of those there are
  int64_t x0, y0, nx, ny;    // the tiles inside (fast) ...
  int64_t tiles_x, tiles_y;  // ... and all tiles; the slow path handles the difference
  bool channels_first;       // neighbouring threads take neighbouring channels, not neighbouring tiles

  int64_t height, width;
  int levels;
  Mode mode;
  double factor;
  DType image_dtype, coeff_dtype;
  Band image;
  Band bands[kPassLevels][4];
  Band carry;  // the last level's LL on its way to or from the next pass, in the type of the arithmetic; or
               // null
};

// How the elements that a thread reads and writes lie in memory.
enum class Kind {
  any,                // any strides: single elements
  planar,             // rows of pixels: vectors along a row
  channels,           // channels innermost, an even number: two channels a thread
  pixels_planar,      // three channels: rows of pixels in the image, all 12 coefficients of a pixel together
  pixels_interleaved  // three channels: both with the channels innermost
};

LITEVAE_CONSTEXPR int lanes_of(Kind kind) {
  return kind == Kind::channels ? 2 : kind == Kind::pixels_planar || kind == Kind::pixels_interleaved ? 3 : 1;
}

namespace {

// What the arithmetic runs in is float or double.
template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::f64 : DType::f32;

// --- Moving runs of N adjacent elements.

template <class S>
struct Load {
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

template <class S>
struct Store {
  static constexpr bool kLoads = false;
  template <int N, class T>
  LITEVAE_DEVICE void operator()(char* at, const T (&v)[N]) const {
    store_vector<S>(at, v);
  }
};

// Calls body with the Store of a type known at run time: a third of the kernels to compile. Only float64 goes
// with float64 on the fast path.
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

// --- Where a thread works.

struct Place {
  int64_t n, c, y, x;  // c: first channel; y, x: tile
};

// Divides `rest` in place and returns the remainder.
LITEVAE_DEVICE int64_t split(int64_t& rest, int64_t by) {
  if (((rest | by) >> 32) == 0) {
    const uint32_t a = static_cast<uint32_t>(rest), b = static_cast<uint32_t>(by), quotient = a / b;
    rest = quotient;
    return a - quotient * b;
  }
  const int64_t quotient = rest / by, remainder = rest - quotient * by;
  rest = quotient;
  return remainder;
}

LITEVAE_DEVICE int64_t offset(const Band& b, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * b.n + c * b.c + y * b.h + x * b.w;
}

// --- Rows of N pixels, from the first channel of the first pixel on; `b` has the strides.

template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_row(char* first, const Band& b, const Move& move, T (&v)[lanes_of(kKind)][N]) {
  constexpr int kLanes = lanes_of(kKind);
  if constexpr (kKind == Kind::planar || kKind == Kind::pixels_planar) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) move(first + k * b.c, v[k]);
  } else if constexpr (kKind == Kind::pixels_interleaved) {
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

// One place in each of the four sub-bands of a level. Only `any` lets their strides differ.
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

// Row r of all four sub-bands, counted from `places`. A load leaves the values of a missing LL as they are.
template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_bands(const BandPlaces<kKind>& places, int r, const Move& move,
                               T (&v)[4][lanes_of(kKind)][N]) {
  if constexpr (kKind == Kind::pixels_planar || kKind == Kind::pixels_interleaved) {
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

// The carry is small, and takes single elements everywhere.
template <Kind kKind, int N, class T, class Move>
LITEVAE_DEVICE void move_carry(const Band& b, const Place& at, int64_t x, const Move& move,
                               T (&v)[lanes_of(kKind)][N]) {
  constexpr int kLanes = lanes_of(kKind);
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T value[1] = {v[k][i]};
      move(b.data + offset(b, at.n, at.c + k, at.y, x + i), value);
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
  if (channels_first) at.c = split(thread, p.channel_groups);
  at.x = p.x0 + split(thread, p.nx);
  at.y = p.y0 + split(thread, p.ny);
  if (!channels_first) at.c = split(thread, p.channel_groups);
  at.c *= kLanes;
  at.n = thread;
  return at;
}

// Tiles are worked on in groups of 2^F rows: all loads of a group, then its arithmetic, then all stores
// behind one look at their type. The more loads in flight the better, until the values fill the registers.
template <int kLevels, Kind kKind>
constexpr int kGroupLevels = kLevels >= 2 && lanes_of(kKind) == 1 ? 2 : 1;

// One row of a level's four sub-bands from two rows of the level below, and back.
template <int kLanes, int N, class T>
LITEVAE_DEVICE void analyse(const T (&top)[kLanes][2 * N], const T (&bottom)[kLanes][2 * N],
                            T (&q)[4][kLanes][N], T factor) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Quad<T> quad =
          butterfly(top[k][2 * j], top[k][2 * j + 1], bottom[k][2 * j], bottom[k][2 * j + 1], factor);
      q[kLL][k][j] = quad.ll, q[kH][k][j] = quad.h, q[kV][k][j] = quad.v, q[kD][k][j] = quad.d;
    }
}

// `more` adds to LL. The butterfly again: its results are a, b, c, d.
template <int kLanes, int N, class T>
LITEVAE_DEVICE void synthesise(const T (&q)[4][kLanes][N], const T (&more)[kLanes][N],
                               T (&top)[kLanes][2 * N], T (&bottom)[kLanes][2 * N], T factor) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Quad<T> quad =
          butterfly(q[kLL][k][j] + more[k][j], q[kH][k][j], q[kV][k][j], q[kD][k][j], factor);
      top[k][2 * j] = quad.ll, top[k][2 * j + 1] = quad.h;
      bottom[k][2 * j] = quad.v, bottom[k][2 * j + 1] = quad.d;
    }
}

template <int kLanes, int N, class T>
LITEVAE_DEVICE void copy(const T (&from)[kLanes][N], T (&to)[kLanes][N]) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) to[k][j] = from[k][j];
}

template <class From, class T, int kLevels, Kind kKind>
struct Analysis {
  static constexpr int kLanes = lanes_of(kKind), F = kGroupLevels<kLevels, kKind>;
  const Pass& p;
  const From load;
  const T factor;
  const Place at;

  // Row i of the tile at a level, in the level's bands or (level 0) the image.
  template <int kLevel>
  LITEVAE_DEVICE BandPlaces<kKind> places(int i) const {
    return {p.bands[kLevel - 1], at, at.y * (1 << (kLevels - kLevel)) + i, at.x * (kTileWidth >> kLevel)};
  }
  LITEVAE_DEVICE char* pixels(int i) const {
    return p.image.data + offset(p.image, at.n, at.c, at.y * (1 << kLevels) + i, at.x * kTileWidth);
  }

  LITEVAE_DEVICE void group(int i, T (&ll)[kLanes][kTileWidth >> F]) const {
    T x[1 << F][kLanes][kTileWidth];
    T one[1 << (F - 1)][4][kLanes][kTileWidth / 2], two[4][kLanes][kTileWidth / 4];
    char* const from = pixels(i << F);
#pragma unroll
    for (int r = 0; r < 1 << F; ++r) move_row<kKind>(from + r * p.image.h, p.image, load, x[r]);
#pragma unroll
    for (int r = 0; r < 1 << (F - 1); ++r) analyse(x[2 * r], x[2 * r + 1], one[r], factor);
    if constexpr (F == 2) {
      analyse(one[0][kLL], one[1][kLL], two, factor);
      copy(two[kLL], ll);
    } else {
      copy(one[0][kLL], ll);
    }
    const BandPlaces<kKind> to_one = places<1>(i << (F - 1)), to_two = places<F>(i);
    with_store<T>(p.coeff_dtype, [&](auto store) {
#pragma unroll
      for (int r = 0; r < 1 << (F - 1); ++r) move_bands(to_one, r, store, one[r]);
      if constexpr (F == 2) move_bands(to_two, 0, store, two);
    });
  }

  // Row i of the tile's part of a level's LL, after storing everything under it.
  template <int kLevel>
  LITEVAE_DEVICE void row(int i, T (&ll)[kLanes][kTileWidth >> kLevel]) const {
    if constexpr (kLevel == F) {
      group(i, ll);
    } else {
      constexpr int N = kTileWidth >> kLevel;
      T top[kLanes][2 * N], bottom[kLanes][2 * N], q[4][kLanes][N];
      row<kLevel - 1>(2 * i, top);
      row<kLevel - 1>(2 * i + 1, bottom);
      analyse(top, bottom, q, factor);
      copy(q[kLL], ll);
      const BandPlaces<kKind> to = places<kLevel>(i);
      with_store<T>(p.coeff_dtype, [&](auto store) { move_bands(to, 0, store, q); });
    }
  }

  LITEVAE_DEVICE void run() const {
    constexpr int N = kTileWidth >> kLevels;
    T ll[kLanes][N];
    row<kLevels>(0, ll);
    if (kLevels == kPassLevels && p.carry.data != nullptr)
      move_carry<kKind>(p.carry, at, at.x * N, Store<T>(), ll);
  }
};

template <class From, class T, int kLevels, Kind kKind>
struct Synthesis {
  static constexpr int kLanes = lanes_of(kKind), F = kGroupLevels<kLevels, kKind>;
  const Pass& p;
  const From load;
  const T factor;
  const Place at;

  // Row i of the tile at a level, in the level's bands or (level 0) the image.
  template <int kLevel>
  LITEVAE_DEVICE BandPlaces<kKind> places(int i) const {
    return {p.bands[kLevel - 1], at, at.y * (1 << (kLevels - kLevel)) + i, at.x * (kTileWidth >> kLevel)};
  }
  LITEVAE_DEVICE char* pixels(int i) const {
    return p.image.data + offset(p.image, at.n, at.c, at.y * (1 << kLevels) + i, at.x * kTileWidth);
  }

  LITEVAE_DEVICE void group(int i, const T (&ll)[kLanes][kTileWidth >> F]) const {
    T x[1 << F][kLanes][kTileWidth];
    T one[1 << (F - 1)][4][kLanes][kTileWidth / 2] = {}, two[4][kLanes][kTileWidth / 4] = {};
    const BandPlaces<kKind> from_one = places<1>(i << (F - 1));
    if constexpr (F == 2) move_bands(places<2>(i), 0, load, two);
#pragma unroll
    for (int r = 0; r < 1 << (F - 1); ++r) move_bands(from_one, r, load, one[r]);
    if constexpr (F == 2) {
      T above[2][kLanes][kTileWidth / 2];
      synthesise(two, ll, above[0], above[1], factor);
      synthesise(one[0], above[0], x[0], x[1], factor);
      synthesise(one[1], above[1], x[2], x[3], factor);
    } else {
      synthesise(one[0], ll, x[0], x[1], factor);
    }
    char* const to = pixels(i << F);
    with_store<T>(p.image_dtype, [&](auto store) {
#pragma unroll
      for (int r = 0; r < 1 << F; ++r) move_row<kKind>(to + r * p.image.h, p.image, store, x[r]);
    });
  }

  // Everything under row i of the tile's part of a level's LL, to which `ll` comes from the coarser levels.
  template <int kLevel>
  LITEVAE_DEVICE void row(int i, const T (&ll)[kLanes][kTileWidth >> kLevel]) const {
    if constexpr (kLevel == F) {
      group(i, ll);
    } else {
      constexpr int N = kTileWidth >> kLevel;
      T top[kLanes][2 * N], bottom[kLanes][2 * N], q[4][kLanes][N] = {};
      move_bands(places<kLevel>(i), 0, load, q);
      synthesise(q, ll, top, bottom, factor);
      row<kLevel - 1>(2 * i, top);
      row<kLevel - 1>(2 * i + 1, bottom);
    }
  }

  LITEVAE_DEVICE void run() const {
    constexpr int N = kTileWidth >> kLevels;
    T ll[kLanes][N] = {};
    if (kLevels == kPassLevels && p.carry.data != nullptr)
      move_carry<kKind>(p.carry, at, at.x * N, Load<T>(), ll);
    row<kLevels>(0, ll);
  }
};

// --- The slow path. Functions that are called, not inlined: it is small and rarely runs.

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

// Where position i of an axis of length n is stored; -1: it is a zero.
LITEVAE_DEVICE int64_t source(int64_t i, int64_t n, Mode mode) { return i < n ? i : extension(n, mode); }

template <class T, int kLevel>
LITEVAE_DEVICE_CALL Quad<T> pull_quad(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x);

// A level's LL at y, x, made from the image.
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

template <class T, int kLevel>
LITEVAE_DEVICE void pull_bands(const Pass& p, const Place& at) {
  if (kLevel > p.levels) return;
  const int tile_height = 1 << (p.levels - kLevel), tile_width = kTileWidth >> kLevel;
  const int64_t height = size_at(p.height, kLevel), width = size_at(p.width, kLevel);
  for (int64_t y = at.y * tile_height; y < (at.y + 1) * tile_height && y < height; ++y)
    for (int64_t x = at.x * tile_width; x < (at.x + 1) * tile_width && x < width; ++x) {
      const Quad<T> q = pull_quad<T, kLevel>(p, at.n, at.c, y, x);
      const Band(&bands)[4] = p.bands[kLevel - 1];
      if (bands[kLL].data != nullptr) store_one(bands[kLL], p.coeff_dtype, at.n, at.c, y, x, q.ll);
      store_one(bands[kH], p.coeff_dtype, at.n, at.c, y, x, q.h);
      store_one(bands[kV], p.coeff_dtype, at.n, at.c, y, x, q.v);
      store_one(bands[kD], p.coeff_dtype, at.n, at.c, y, x, q.d);
      if (kLevel == p.levels && p.carry.data != nullptr)
        store_one(p.carry, kDTypeOf<T>, at.n, at.c, y, x, q.ll);
    }
}

template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_pixel(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x);

// What the coefficients of the level above say about position y, x of level kLevel's LL (level 0: the image),
// which may be one past the end.
template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_part(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
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

// Position y, x of level kLevel's LL: its own part and those of the missing samples that it stands for.
template <class T, int kLevel>
LITEVAE_DEVICE_CALL T pull_pixel(const Pass& p, int64_t n, int64_t c, int64_t y, int64_t x) {
  const int64_t height = size_at(p.height, kLevel), width = size_at(p.width, kLevel);
  const bool fold_y = height % 2 != 0 && extension(height, p.mode) == y;
  const bool fold_x = width % 2 != 0 && extension(width, p.mode) == x;
  T value = pull_part<T, kLevel>(p, n, c, y, x);
  if (fold_x) value += pull_part<T, kLevel>(p, n, c, y, width);
  if (fold_y) {
    T missing = pull_part<T, kLevel>(p, n, c, height, x);
    if (fold_x) missing += pull_part<T, kLevel>(p, n, c, height, width);
    value += missing;
  }
  return value;
}

LITEVAE_DEVICE Place edge_place_of(const Pass& p, int64_t thread) {
  Place at;
  const int64_t full_rows = p.tiles_y - p.ny;
  int64_t edge = split(thread, p.tiles_x * p.tiles_y - p.nx * p.ny);
  if (edge < full_rows * p.tiles_x) {
    at.x = split(edge, p.tiles_x);
    at.y = edge < p.y0 ? edge : edge + p.ny;
  } else {
    edge -= full_rows * p.tiles_x;
    at.x = split(edge, p.tiles_x - p.nx);
    if (at.x >= p.x0) at.x += p.nx;
    at.y = p.y0 + edge;
  }
  at.c = split(thread, p.channel_groups);
  at.n = thread;
  return at;
}

// --- What is launched: one type a kernel.

template <bool kIsAnalysis, class From, class T, int kLevels, Kind kKind>
struct Inside {
  static constexpr bool kAnalysis = kIsAnalysis;
  static LITEVAE_DEVICE void run(const Pass& p, int64_t thread) {
    const T factor = static_cast<T>(p.factor);
    const Place at = place_of<kKind>(p, thread);
    if constexpr (kAnalysis)
      Analysis<From, T, kLevels, kKind>{p, load_of(p), factor, at}.run();
    else
      Synthesis<From, T, kLevels, kKind>{p, load_of(p), factor, at}.run();
  }

 private:
  static LITEVAE_DEVICE From load_of(const Pass& p) {
    if constexpr (std::is_same<From, LoadEither16>::value)
      return LoadEither16{(kAnalysis ? p.image_dtype : p.coeff_dtype) == DType::f16};
    else
      return From();
  }
};

template <bool kIsAnalysis, class T>
struct Edge {
  static constexpr bool kAnalysis = kIsAnalysis;
  static LITEVAE_DEVICE void run(const Pass& p, int64_t thread) {
    const Place at = edge_place_of(p, thread);
    if constexpr (kAnalysis) {
      pull_bands<T, 1>(p, at);
      pull_bands<T, 2>(p, at);
      pull_bands<T, 3>(p, at);
    } else {
      const int64_t tile_height = int64_t{1} << p.levels;
      for (int64_t y = at.y * tile_height; y < (at.y + 1) * tile_height && y < p.height; ++y)
        for (int64_t x = at.x * kTileWidth; x < (at.x + 1) * kTileWidth && x < p.width; ++x)
          store_one(p.image, p.image_dtype, at.n, at.c, y, x, pull_pixel<T, 0>(p, at.n, at.c, y, x));
    }
  }
};

}  // namespace
}  // namespace haar
}  // namespace litevae
