// Registers Haar analysis and synthesis.
#include "../common/bindings.h"

#include "../common/isa.h"
#include "haar.h"

LITEVAE_DISPATCH_ISA(haar_analysis, haar::Transform)
LITEVAE_DISPATCH_ISA(haar_synthesis, haar::Transform)

namespace litevae {
namespace {

using haar::Transform;

// The sizes and dtypes of a transform, without its coefficients.
Transform make_shape(const TensorView& image, const TensorView& coeffs, int levels) {
  if (levels < 1 || levels > haar::kMaxLevels) throw std::invalid_argument("levels out of range");
  Transform t{};
  t.batch = image.size[0], t.channels = image.size[1], t.height = image.size[2], t.width = image.size[3];
  t.levels = levels;
  t.image_dtype = image.dtype, t.coeff_dtype = coeffs.dtype;
  return t;
}

// If `stacked`, there is one tensor per level, finest level first, whose channels are those of the sub-bands
// one after the other. Otherwise the order is that of PyWavelets: LL of the coarsest level, then H, V and D
// of each level, coarsest level first.
Transform make_transform(const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
                         double factor, bool stacked) {
  if (mode < 0 || mode > 4) throw std::invalid_argument("unknown mode code " + std::to_string(mode));
  if (levels < 1 || coeffs.size() != static_cast<size_t>(stacked ? levels : 1 + 3 * levels))
    throw std::invalid_argument("wrong number of coefficient tensors");
  Transform t = make_shape(image, coeffs[0], levels);
  t.mode = static_cast<haar::Mode>(mode), t.factor = factor;
  t.image = {static_cast<char*>(image.data), image.stride[0], image.stride[1], image.stride[2],
             image.stride[3]};

  int64_t height = t.height, width = t.width;
  for (int level = 0; level < levels; ++level) {
    height = haar::half_up(height), width = haar::half_up(width);
    for (int band = 0; band < 4; ++band) {
      if (!stacked && band == haar::kLL && level + 1 < levels) continue;
      const TensorView& c = stacked             ? coeffs[level]
                            : band == haar::kLL ? coeffs[0]
                                                : coeffs[1 + 3 * (levels - 1 - level) + band - 1];
      if (c.size[0] != t.batch || c.size[1] != (stacked ? 4 : 1) * t.channels || c.size[2] != height ||
          c.size[3] != width || c.dtype != t.coeff_dtype)
        throw std::invalid_argument("coefficients of level " + std::to_string(level + 1) +
                                    " do not fit the image");
      const int64_t offset = stacked ? band * t.channels * c.stride[1] : 0;
      t.bands[level][band] = {static_cast<char*>(c.data) + offset * element_size(c.dtype), c.stride[0],
                              c.stride[1], c.stride[2], c.stride[3]};
    }
  }
  return t;
}

bool is_empty(const Transform& t) { return t.batch * t.channels * t.height * t.width == 0; }

template <void (*run)(const Transform&, int)>
void run_on_cpu(const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
                double factor, bool stacked, int threads) {
  const Transform t = make_transform(image, coeffs, levels, mode, factor, stacked);
  if (!is_empty(t)) run(t, threads);
}

#ifdef LITEVAE_CUDA
template <void (*run)(const Transform&, void*, int, void*)>
void run_on_gpu(const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
                double factor, bool stacked, uintptr_t scratch, int device, uintptr_t stream) {
  const Transform t = make_transform(image, coeffs, levels, mode, factor, stacked);
  if (!is_empty(t)) run(t, pointer(scratch), device, pointer(stream));
}
#endif

}  // namespace

void bind_haar(py::module_& m) {
  m.def("haar_analysis_cpu", &run_on_cpu<haar_analysis>, WithoutGil());
  m.def("haar_synthesis_cpu", &run_on_cpu<haar_synthesis>, WithoutGil());
#ifdef LITEVAE_CUDA
  m.def("haar_scratch_bytes", [](const TensorView& image, const TensorView& coeffs, int levels) {
    return haar_scratch_bytes(make_shape(image, coeffs, levels));
  });
  m.def("haar_analysis_cuda", &run_on_gpu<haar_analysis_cuda>);
  m.def("haar_synthesis_cuda", &run_on_gpu<haar_synthesis_cuda>);
#endif
}

}  // namespace litevae
