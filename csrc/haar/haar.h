// The two-dimensional Haar transform: definitions that the CPU and the CUDA code share.
//
// With pixels  a b  PyWavelets' coefficients are  LL=(a+b+c+d)/2  H=(a+b-c-d)/2
//              c d                                V=(a-b+c-d)/2   D=(a-b-c+d)/2.
// Level l transforms level l-1's LL; each level multiplies by `factor` (1/2: orthonormal; 1/4: LiteVAE's
// pyramid, where LL is the local mean). Factors are powers of two, so scaling never rounds.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

#if defined(__CUDACC__)
#define LITEVAE_HD __host__ __device__ __forceinline__
#else
#define LITEVAE_HD inline
#endif

namespace litevae {
namespace haar {

constexpr int kMaxLevels = 16;

enum class Mode : int { symmetric = 0, reflect = 1, zero = 2, periodic = 3, constant = 4 };
enum BandIndex : int { kLL = 0, kH = 1, kV = 2, kD = 3 };

template <class T>
struct Quad {
  T ll, h, v, d;
};

// The butterfly, which is its own inverse and adjoint up to the factor. Rows are added before columns, as in
// the vector code, so that every path gives the same bits. It has internal linkage on the CPU, because every
// instruction set must keep its own copy.
template <class T>
static LITEVAE_HD Quad<T> butterfly(T a, T b, T c, T d, T factor) {
  const T left = a + c, right = b + d, left_change = a - c, right_change = b - d;
  return {(left + right) * factor, (left_change + right_change) * factor, (left - right) * factor,
          (left_change - right_change) * factor};
}

// Returns the index of the sample that extends an axis of odd length n, or -1 for a zero.
static LITEVAE_HD int64_t extension(int64_t n, Mode mode) {
  switch (mode) {
    case Mode::zero:
      return -1;
    case Mode::reflect:
      return n - 2;
    case Mode::periodic:
      return 0;
    default:
      return n - 1;  // symmetric and constant modes both repeat the last sample
  }
}

static LITEVAE_HD int64_t half_up(int64_t n) { return (n + 1) / 2; }

// One sub-band of one level, or the image: address, and strides in elements. If the address is null, analysis
// does not write the band, and synthesis takes it as zero.
struct Band {
  char* data;
  int64_t n, c, h, w;
};

// A call, between the image and bands[level - 1][LL, H, V, D].
struct Transform {
  int64_t batch, channels, height, width;
  int levels;
  Mode mode;
  double factor;
  DType image_dtype, coeff_dtype;
  Band image;
  Band bands[kMaxLevels][4];
};

}  // namespace haar

// Only in a core with CUDA. `scratch` has haar_scratch_bytes(call) bytes; it may be null if that is 0.
int64_t haar_scratch_bytes(const haar::Transform& call);  // needs the sizes, the levels and the dtypes only
void haar_analysis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);
void haar_synthesis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);

}  // namespace litevae
