// Haar analysis and synthesis on the CPU: one pass over the image for any number of levels, row by row.
//
// Both directions are recursions over rows, so a block of 2^levels image rows stays in the first-level cache
// while all its coefficients are computed. A row is a dense array of `pixels x lanes` values: lanes is 1 for
// planar tensors, and the number of channels where channels are innermost. Rows that are stored in this form
// are used in place; others (half types, strided) are copied through a scratch row.
//
// This file is compiled once per instruction set, so everything below has internal linkage, and no library
// templates are used.
#include <cstdlib>
#include <new>

#include "../common/convert.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "haar.h"

namespace litevae {
namespace LITEVAE_ISA {
using haar::Transform;

namespace {

using namespace haar;

// Destination of one row of the four sub-bands. `keep` is a second copy of LL that the next level reads; both
// to[kLL] and `keep` may be null.
template <class T>
struct BandRows {
  T* to[4];
  T* keep;
  bool stream;  // stores to `to` bypass the cache
};

template <class T>
void put_quad(const BandRows<T>& rows, int64_t at, const Quad<T>& q) {
  if (rows.to[kLL] != nullptr) rows.to[kLL][at] = q.ll;
  rows.to[kH][at] = q.h, rows.to[kV][at] = q.v, rows.to[kD][at] = q.d;
  if (rows.keep != nullptr) rows.keep[at] = q.ll;
}

// There are two passes over the rows, and the second reads from the first-level cache: sums give LL and V,
// differences give H and D. Two streams of stores at a time are faster than four.
template <bool kStream>
int64_t analysis_vectors(const float* r0, const float* r1, const BandRows<float>& rows, int64_t pairs,
                         float factor) {
  const auto write = [](VecF value, float* to) { kStream ? value.stream(to) : value.store(to); };
  const VecF f = VecF::set(factor);
  // Local copies, because the compiler assumes that vector stores alias `rows`.
  float *const to_ll = rows.to[kLL], *const to_h = rows.to[kH], *const to_v = rows.to[kV];
  float *const to_d = rows.to[kD], *const keep = rows.keep;
  const int64_t end = pairs / VecF::width * VecF::width;
  VecF even, odd;
  for (int64_t j = 0; j < end; j += VecF::width) {
    deinterleave(VecF::load(r0 + 2 * j) + VecF::load(r1 + 2 * j),
                 VecF::load(r0 + 2 * j + VecF::width) + VecF::load(r1 + 2 * j + VecF::width), even, odd);
    const VecF ll = (even + odd) * f;
    if (to_ll != nullptr) write(ll, to_ll + j);
    if (keep != nullptr) ll.store(keep + j);
    write((even - odd) * f, to_v + j);
  }
  for (int64_t j = 0; j < end; j += VecF::width) {
    deinterleave(VecF::load(r0 + 2 * j) - VecF::load(r1 + 2 * j),
                 VecF::load(r0 + 2 * j + VecF::width) - VecF::load(r1 + 2 * j + VecF::width), even, odd);
    write((even + odd) * f, to_h + j);
    write((even - odd) * f, to_d + j);
  }
  return end;
}

template <bool kStream>
int64_t synthesis_vectors(const float* ll, const float* h, const float* v, const float* d, float* r0,
                          float* r1, int64_t pairs, float factor) {
  const auto write = [](VecF value, float* to) { kStream ? value.stream(to) : value.store(to); };
  const VecF f = VecF::set(factor);
  int64_t j = 0;
  for (; j + VecF::width <= pairs; j += VecF::width) {
    const VecF l = VecF::load(ll + j), vertical = VecF::load(v + j);
    const VecF horizontal = VecF::load(h + j), diagonal = VecF::load(d + j);
    const VecF sum_even = (l + vertical) * f, sum_odd = (l - vertical) * f;
    const VecF difference_even = (horizontal + diagonal) * f, difference_odd = (horizontal - diagonal) * f;
    VecF x0, x1;
    interleave(sum_even + difference_even, sum_odd + difference_odd, x0, x1);
    write(x0, r0 + 2 * j), write(x1, r0 + 2 * j + VecF::width);
    interleave(sum_even - difference_even, sum_odd - difference_odd, x0, x1);
    write(x0, r1 + 2 * j), write(x1, r1 + 2 * j + VecF::width);
  }
  return j;
}

int64_t analysis_vectors(const float* r0, const float* r1, const BandRows<float>& rows, int64_t pairs,
                         float factor) {
  return rows.stream ? analysis_vectors<true>(r0, r1, rows, pairs, factor)
                     : analysis_vectors<false>(r0, r1, rows, pairs, factor);
}
int64_t synthesis_vectors(const float* ll, const float* h, const float* v, const float* d, float* r0,
                          float* r1, bool stream, int64_t pairs, float factor) {
  return stream ? synthesis_vectors<true>(ll, h, v, d, r0, r1, pairs, factor)
                : synthesis_vectors<false>(ll, h, v, d, r0, r1, pairs, factor);
}

// The vector functions return the number of pairs that they did. Types without vector code do none.
template <class T>
int64_t analysis_vectors(const T*, const T*, const BandRows<T>&, int64_t, T) {
  return 0;
}
template <class T>
int64_t synthesis_vectors(const T*, const T*, const T*, const T*, T*, T*, bool, int64_t, T) {
  return 0;
}

template <class T>
void analysis_pairs(const T* r0, const T* r1, const BandRows<T>& rows, int64_t pairs, int64_t lanes,
                    T factor) {
  for (int64_t j = lanes == 1 ? analysis_vectors(r0, r1, rows, pairs, factor) : 0; j < pairs; ++j) {
    const int64_t even = 2 * j * lanes, odd = even + lanes;
    for (int64_t k = 0; k < lanes; ++k)
      put_quad(rows, j * lanes + k, butterfly(r0[even + k], r0[odd + k], r1[even + k], r1[odd + k], factor));
  }
}

template <class T>
void synthesis_pairs(const T* ll, const T* h, const T* v, const T* d, T* r0, T* r1, bool stream,
                     int64_t pairs, int64_t lanes, T factor) {
  int64_t j = lanes == 1 ? synthesis_vectors(ll, h, v, d, r0, r1, stream, pairs, factor) : 0;
  for (; j < pairs; ++j) {
    const int64_t even = 2 * j * lanes, odd = even + lanes, from = j * lanes;
    for (int64_t k = 0; k < lanes; ++k) {
      // The butterfly again: (LL+H+V+D, LL+H-V-D; LL-H+V-D, LL-H-V+D) are a, b, c, d.
      const Quad<T> q = butterfly(ll[from + k], h[from + k], v[from + k], d[from + k], factor);
      r0[even + k] = q.ll, r0[odd + k] = q.h, r1[even + k] = q.v, r1[odd + k] = q.d;
    }
  }
}

// One channel of a stored tensor, or with several lanes one image of it.
struct Plane {
  char* first;      // the first row; null: there is no such band
  int64_t row;      // bytes from row to row
  int64_t pixel;    // elements from pixel to pixel
  bool in_place;    // rows are dense, of the arithmetic's type, and used without a copy
  bool streamable;  // in place, and every row consists of whole cache lines

  char* at(int64_t y) const { return first + y * row; }
};

// The parts that both directions share: level sizes, the current plane, and scratch rows.
template <class T>
class Rows {
 public:
  bool ready() const { return arena != nullptr; }

 protected:
  Rows(const Transform& call, int64_t lanes, bool stream)
      : p(call), lanes(lanes), stream(stream), factor(static_cast<T>(call.factor)) {
    height[0] = p.height, width[0] = p.width;
    for (int level = 1; level <= p.levels; ++level) {
      height[level] = half_up(height[level - 1]);
      width[level] = half_up(width[level - 1]);
    }
  }
  ~Rows() {
    stream_fence();
    std::free(arena);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Allocates `rows` scratch rows, aligned to cache lines; each holds an image row and one more pixel.
  void reserve(int64_t rows) {
    pitch = ((p.width + 1) * lanes * sizeof(T) + 127) / 64 * 64 + 64;
    arena = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(pitch * rows)));
  }
  T* take() { return arena == nullptr ? nullptr : reinterpret_cast<T*>(arena + pitch * taken++); }

  // Makes this the current plane. Returns whether it was another one before.
  bool select(int64_t n, int64_t c) {
    if (n == selected_n && c == selected_c) return false;
    selected_n = n, selected_c = c;
    image = plane(p.image, p.image_dtype, n, c, width[0]);
    for (int level = 1; level <= p.levels; ++level)
      for (int band = 0; band < 4; ++band)
        bands[level][band] = plane(p.bands[level - 1][band], p.coeff_dtype, n, c, width[level]);
    return true;
  }

  const Transform& p;
  const int64_t lanes;
  const bool stream;
  const T factor;
  int64_t height[kMaxLevels + 1], width[kMaxLevels + 1];
  Plane image, bands[kMaxLevels + 1][4];

 private:
  Plane plane(const Band& band, DType dtype, int64_t n, int64_t c, int64_t pixels) const {
    if (band.data == nullptr) return {nullptr, 0, 0, false, false};
    const int64_t size = element_size(dtype);
    Plane plane{band.data + size * (n * band.n + c * band.c), size * band.h, band.w, false, false};
    plane.in_place = dtype == dtype_of<T>() && band.w == lanes;  // several lanes: channels are innermost
    const int64_t alignment = reinterpret_cast<int64_t>(plane.first) | plane.row | pixels * lanes * size;
    plane.streamable = stream && plane.in_place && alignment % 64 == 0;
    return plane;
  }

  char* arena = nullptr;
  int64_t selected_n = -1, selected_c = -1;
  int64_t pitch = 0, taken = 0;
};

template <class T>
class Analysis : public Rows<T> {
  using Rows<T>::p;
  using Rows<T>::lanes;
  using Rows<T>::height;
  using Rows<T>::width;

 public:
  Analysis(const Transform& call, int64_t lanes, bool stream) : Rows<T>(call, lanes, stream) {
    this->reserve(2 * (call.levels + 1) + 5);
    for (int level = 0; level <= call.levels; ++level)
      for (int slot = 0; slot < 2; ++slot) ll[level][slot] = this->take();
    for (T*& row : scratch) row = this->take();
    zeros = this->take();
    for (int64_t i = 0; this->ready() && i < width[0] * lanes; ++i) zeros[i] = 0;
    for (int band = 0; band < 4; ++band) discard.first[band] = scratch[band];
  }

  // Stores row `row` of the coarsest level and all finer coefficients under it.
  void run(int64_t n, int64_t c, int64_t row) {
    if (this->select(n, c)) set_targets();
    ll_row(p.levels, row, 0, true);
  }

 private:
  // Where the rows of a level's bands are computed: in place, or each in one scratch row (pitch 0) from which
  // it is stored (`staged`). A band that is not wanted has a null address.
  struct Target {
    T* first[4];
    int64_t pitch[4];
    bool staged, stream;
  };

  void set_targets() {
    for (int level = 1; level <= p.levels; ++level) {
      Target& target = targets[level];
      target.staged = false, target.stream = true;
      for (int band = 0; band < 4; ++band) {
        const Plane& to = this->bands[level][band];
        const bool wanted = to.first != nullptr;
        target.first[band] = !wanted ? nullptr : to.in_place ? reinterpret_cast<T*>(to.first) : scratch[band];
        target.pitch[band] = to.in_place ? to.row / static_cast<int64_t>(sizeof(T)) : 0;
        target.staged |= wanted && !to.in_place;
        target.stream &= !wanted || to.streamable;
      }
    }
  }

  const T* image_row(int64_t row, int slot) {
    const char* from = this->image.at(row);
    if (this->image.in_place) return reinterpret_cast<const T*>(from);
    load_row(p.image_dtype, from, this->image.pixel, width[0], lanes, ll[0][slot]);
    return ll[0][slot];
  }

  // Returns row `row` of level `level`'s LL (level 0: the image). With `store`, all sub-bands under it are
  // stored as well; otherwise they go to scratch rows.
  const T* ll_row(int level, int64_t row, int slot, bool store) {
    if (level == 0) return image_row(row, slot);
    const T* top = ll_row(level - 1, 2 * row, 0, store);
    const T* bottom;
    if (2 * row + 1 < height[level - 1]) {
      bottom = ll_row(level - 1, 2 * row + 1, 1, store);
    } else {
      const int64_t extension_index = extension(height[level - 1], p.mode);
      bottom = extension_index < 0          ? zeros
               : extension_index == 2 * row ? top
                                            : ll_row(level - 1, extension_index, 1, false);
    }

    const Target& target = store ? targets[level] : discard;
    BandRows<T> rows;
    for (int band = 0; band < 4; ++band) rows.to[band] = target.first[band] + row * target.pitch[band];
    rows.keep = level < p.levels ? ll[level][slot] : nullptr;
    rows.stream = target.stream;
    const int64_t pairs = width[level - 1] / 2;
    analysis_pairs(top, bottom, rows, pairs, lanes, this->factor);
    if (width[level - 1] % 2 != 0) {
      const int64_t last = 2 * pairs * lanes, extension_index = extension(width[level - 1], p.mode) * lanes;
      for (int64_t k = 0; k < lanes; ++k) {
        const T b = extension_index < 0 ? 0 : top[extension_index + k],
                d = extension_index < 0 ? 0 : bottom[extension_index + k];
        put_quad(rows, pairs * lanes + k, butterfly(top[last + k], b, bottom[last + k], d, this->factor));
      }
    }
    for (int band = 0; target.staged && band < 4; ++band) {
      const Plane& to = this->bands[level][band];
      if (to.first != nullptr && !to.in_place)
        store_row(p.coeff_dtype, rows.to[band], to.at(row), to.pixel, width[level], lanes);
    }
    return rows.keep;
  }

  Target targets[kMaxLevels + 1], discard{};
  T *ll[kMaxLevels + 1][2], *scratch[4], *zeros;
};

// The adjoint of Analysis; with mode `zero` and factor 1/2 also its inverse. Rows are pulled: an image row
// needs the coefficient row that covers it, which needs the LL row of the next level. Each level keeps the
// last pair of rows that it computed, so that no pair is computed twice. The fold of an odd axis' missing
// sample may need another row of the plane (reflect, periodic), so it has a second pair.
template <class T>
class Synthesis : public Rows<T> {
  using Rows<T>::p;
  using Rows<T>::lanes;
  using Rows<T>::height;
  using Rows<T>::width;

 public:
  Synthesis(const Transform& call, int64_t lanes, bool stream) : Rows<T>(call, lanes, stream) {
    this->reserve(6 * (call.levels + 1) + 4);
    for (int level = 0; level <= call.levels; ++level) {
      for (Pair& pair : pairs[level]) pair.upper = this->take(), pair.lower = this->take();
      total[level] = this->take(), folded[level] = this->take();
    }
    for (T*& row : band_row) row = this->take();
  }

  // Stores all image rows under row `row` of the coarsest level.
  void run(int64_t n, int64_t c, int64_t row) {
    this->select(n, c);
    for (int level = 0; level <= p.levels; ++level) pairs[level][0].row = pairs[level][1].row = -1;
    const Plane& image = this->image;
    const bool in_place = image.in_place && width[0] % 2 == 0;
    const int64_t first = row << (p.levels - 1), last = (row + 1) << (p.levels - 1);
    for (int64_t i = first; i < last && i < height[1]; ++i) {
      const int64_t y = 2 * i;
      if (in_place && y + 1 < height[0] && !receives_fold(0, y) && !receives_fold(0, y + 1)) {
        compute_pair(1, i, reinterpret_cast<T*>(image.at(y)), reinterpret_cast<T*>(image.at(y + 1)),
                     image.streamable);
        continue;
      }
      for (int64_t r = y; r < y + 2 && r < height[0]; ++r)
        store_row(p.image_dtype, level_row(0, r), image.at(r), image.pixel, width[0], lanes);
    }
  }

 private:
  struct Pair {
    int64_t row;
    T *upper, *lower;
  };

  bool receives_fold(int level, int64_t row) const {
    return height[level] % 2 != 0 && extension(height[level], p.mode) == row;
  }

  const T* coefficients(int level, int band, int64_t row) {
    const Plane& plane = this->bands[level][band];
    if (plane.in_place) return reinterpret_cast<const T*>(plane.at(row));
    load_row(p.coeff_dtype, plane.at(row), plane.pixel, width[level], lanes, band_row[band]);
    return band_row[band];
  }

  // Row `row` of level `level`'s LL: the given coefficients plus the share of the coarser levels.
  const T* ll_row(int level, int64_t row) {
    const T* coarser = level < p.levels ? level_row(level, row) : nullptr;
    if (this->bands[level][kLL].first == nullptr) return coarser;
    const T* given = coefficients(level, kLL, row);
    if (coarser == nullptr) return given;
    T* __restrict sum = total[level];
    for (int64_t i = 0; i < width[level] * lanes; ++i) sum[i] = given[i] + coarser[i];
    return sum;
  }

  // Computes the two rows of level `level - 1` under coefficient row `row` of level `level`, and folds the
  // missing column.
  void compute_pair(int level, int64_t row, T* upper, T* lower, bool stream) {
    const T* ll = ll_row(level, row);
    const T* h = coefficients(level, kH, row);
    const T* v = coefficients(level, kV, row);
    const T* d = coefficients(level, kD, row);
    synthesis_pairs(ll, h, v, d, upper, lower, stream, width[level], lanes, this->factor);
    const int64_t n = width[level - 1];
    const int64_t to = n % 2 != 0 ? extension(n, p.mode) : -1;
    if (to < 0) return;
    for (int64_t k = 0; k < lanes; ++k) {
      upper[to * lanes + k] += upper[n * lanes + k];
      lower[to * lanes + k] += lower[n * lanes + k];
    }
  }

  // Row `row` of level `level`'s LL as the coefficients of level + 1 give it, without the fold of a missing
  // row.
  const T* row_of_pair(int level, int64_t row, Pair& pair) {
    if (pair.row != row / 2) {
      compute_pair(level + 1, row / 2, pair.upper, pair.lower, false);
      pair.row = row / 2;
    }
    return row % 2 == 0 ? pair.upper : pair.lower;
  }

  // Row `row` of level `level`'s LL (level 0: the image) from the coarser levels.
  const T* level_row(int level, int64_t row) {
    const T* own = row_of_pair(level, row, pairs[level][0]);
    if (!receives_fold(level, row)) return own;
    const T* missing = row_of_pair(level, height[level], pairs[level][1]);
    T* __restrict sum = folded[level];
    for (int64_t i = 0; i < width[level] * lanes; ++i) sum[i] = own[i] + missing[i];
    return sum;
  }

  Pair pairs[kMaxLevels + 1][2];
  T *total[kMaxLevels + 1], *folded[kMaxLevels + 1], *band_row[4];
};

// Lanes per pixel: the channels where they are innermost in the image and in every band, otherwise 1.
int64_t lanes_of(const Transform& p) {
  if (p.channels == 1 || p.image.c != 1) return 1;
  for (int level = 0; level < p.levels; ++level)
    for (const Band& band : p.bands[level])
      if (band.data != nullptr && band.c != 1) return 1;
  return p.channels;
}

// Results of this size leave the caches before they are read. Stores that bypass the caches save reading the
// lines first.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

template <template <class> class Direction, class T>
void run(const Transform& p, int threads) {
  const int64_t lanes = lanes_of(p), channels = p.channels / lanes;
  int64_t rows = p.height;
  for (int level = 0; level < p.levels; ++level) rows = half_up(rows);
  // Tasks run along the rows of a plane, or along channels where several channels share a cache line.
  const bool channels_inner = p.image.c == 1 || p.bands[p.levels - 1][kH].c == 1;
  const int64_t inner = channels_inner ? channels : rows;
  const int64_t elements = p.batch * p.channels * p.height * p.width;
  if (elements < 1 << 15) threads = 1;  // starting a thread would cost more
  const bool stream = lanes == 1 && elements * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  bool out_of_memory = false;  // an exception must not leave a thread of the team, so it is thrown afterwards
  parallel_for(p.batch * channels * rows, threads, [&](int64_t begin, int64_t end) {
    Direction<T> direction(p, lanes, stream);
    if (!direction.ready()) return __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (channels * rows), rest = task % (channels * rows);
      const int64_t outer_index = rest / inner, inner_index = rest % inner;
      direction.run(n, channels_inner ? inner_index : outer_index,
                    channels_inner ? outer_index : inner_index);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

bool in_double(const Transform& p) { return p.image_dtype == DType::f64 || p.coeff_dtype == DType::f64; }

}  // namespace

void haar_analysis(const Transform& call, int threads) {
  in_double(call) ? run<Analysis, double>(call, threads) : run<Analysis, float>(call, threads);
}

void haar_synthesis(const Transform& call, int threads) {
  in_double(call) ? run<Synthesis, double>(call, threads) : run<Synthesis, float>(call, threads);
}

}  // namespace LITEVAE_ISA
}  // namespace litevae
