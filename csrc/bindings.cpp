// The one file that knows Python. Tensors arrive as (address, dtype code, sizes, strides); the Python side
// has validated them and allocated the outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "haar/haar.h"

namespace py = pybind11;
using litevae::TensorView;
using litevae::haar::Transform;

LITEVAE_DISPATCH_ISA(haar_analysis, (const haar::Transform& call, int threads), call, threads)
LITEVAE_DISPATCH_ISA(haar_synthesis, (const haar::Transform& call, int threads), call, threads)

#ifdef LITEVAE_CUDA
namespace litevae {
void haar_analysis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);
void haar_synthesis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);
}  // namespace litevae
#endif

namespace {

TensorView view(uintptr_t data, int dtype, const std::vector<int64_t>& size,
                const std::vector<int64_t>& stride) {
  if (size.size() != 4 || stride.size() != 4) throw std::invalid_argument("a tensor must have 4 dimensions");
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
  TensorView t{reinterpret_cast<void*>(data), static_cast<litevae::DType>(dtype), {}, {}};
  for (int i = 0; i < 4; ++i) t.size[i] = size[i], t.stride[i] = stride[i];
  return t;
}

// `stacked`: one tensor a level with the sub-bands behind each other in its channels, finest level first.
// Otherwise PyWavelets' order: LL of the coarsest level, then H, V, D of each level, coarsest first.
Transform transform(const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
                    double factor, bool stacked) {
  using namespace litevae;
  Transform t{};
  if (levels < 1 || levels > haar::kMaxLevels) throw std::invalid_argument("levels out of range");
  if (mode < 0 || mode > 4) throw std::invalid_argument("unknown mode code " + std::to_string(mode));
  if (coeffs.size() != static_cast<size_t>(stacked ? levels : 1 + 3 * levels))
    throw std::invalid_argument("wrong number of coefficient tensors");
  t.batch = image.size[0], t.channels = image.size[1], t.height = image.size[2], t.width = image.size[3];
  t.levels = levels, t.mode = static_cast<haar::Mode>(mode), t.factor = factor;
  t.image_dtype = image.dtype, t.coeff_dtype = coeffs[0].dtype;
  t.image = {static_cast<char*>(image.data), image.stride[0], image.stride[1], image.stride[2],
             image.stride[3]};

  int64_t height = t.height, width = t.width;
  for (int level = 0; level < levels; ++level) {
    height = haar::half_up(height), width = haar::half_up(width);
    for (int band = 0; band < 4; ++band) {
      haar::Band& b = t.bands[level][band];
      if (!stacked && band == haar::kLL && level + 1 < levels) continue;
      const TensorView& c = stacked             ? coeffs[level]
                            : band == haar::kLL ? coeffs[0]
                                                : coeffs[1 + 3 * (levels - 1 - level) + band - 1];
      if (c.size[0] != t.batch || c.size[1] != (stacked ? 4 : 1) * t.channels || c.size[2] != height ||
          c.size[3] != width || c.dtype != t.coeff_dtype)
        throw std::invalid_argument("coefficients of level " + std::to_string(level + 1) +
                                    " do not fit the image");
      const int64_t offset = stacked ? band * t.channels * c.stride[1] : 0;
      b = {static_cast<char*>(c.data) + offset * element_size(c.dtype), c.stride[0], c.stride[1], c.stride[2],
           c.stride[3]};
    }
  }
  return t;
}

bool is_empty(const Transform& t) { return t.batch * t.channels * t.height * t.width == 0; }

}  // namespace

PYBIND11_MODULE(litevae_core, m) {
  m.doc() = "litevae's compiled core: raw addresses in, no tensors";
  // Raised with every change of these functions' arguments or meaning; litevae_kernels/backend.py names the
  // same.
  m.attr("interface") = 1;
  const litevae::Isa best = litevae::detect_isa();
  static litevae::Isa isa = best;
  m.def("isa", [] { return litevae::isa_name(isa); });
  m.def("set_isa", [best](const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best); ++i) {
      if (name != litevae::isa_name(static_cast<litevae::Isa>(i))) continue;
      isa = static_cast<litevae::Isa>(i);
      return;
    }
    throw std::invalid_argument("this CPU does not run '" + name + "' code; the best is " +
                                litevae::isa_name(best));
  });
  m.attr("compiler") = LITEVAE_COMPILER;
  m.attr("openmp") = static_cast<bool>(LITEVAE_OPENMP);
  m.attr("cuda_version") = LITEVAE_CUDA_VERSION;  // empty: not built
  m.attr("cuda_architectures") = LITEVAE_CUDA_ARCHITECTURES;
  m.attr("cuda_reason") = LITEVAE_CUDA_REASON;  // why it was not built

  py::class_<TensorView>(m, "TensorView")
      .def(py::init(&view), py::arg("data"), py::arg("dtype"), py::arg("size"), py::arg("stride"));

  m.def("haar_analysis_cpu", [](const TensorView& image, const std::vector<TensorView>& coeffs, int levels,
                                int mode, double factor, bool stacked, int threads) {
    const Transform t = transform(image, coeffs, levels, mode, factor, stacked);
    py::gil_scoped_release release;
    if (!is_empty(t)) litevae::haar_analysis(isa, t, threads);
  });
  m.def("haar_synthesis_cpu", [](const TensorView& image, const std::vector<TensorView>& coeffs, int levels,
                                 int mode, double factor, bool stacked, int threads) {
    const Transform t = transform(image, coeffs, levels, mode, factor, stacked);
    py::gil_scoped_release release;
    if (!is_empty(t)) litevae::haar_synthesis(isa, t, threads);
  });
#ifdef LITEVAE_CUDA
  m.def("haar_analysis_cuda",
        [](const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
           double factor, bool stacked, uintptr_t scratch, int device, uintptr_t stream) {
          const Transform t = transform(image, coeffs, levels, mode, factor, stacked);
          if (!is_empty(t))
            litevae::haar_analysis_cuda(t, reinterpret_cast<void*>(scratch), device,
                                        reinterpret_cast<void*>(stream));
        });
  m.def("haar_synthesis_cuda",
        [](const TensorView& image, const std::vector<TensorView>& coeffs, int levels, int mode,
           double factor, bool stacked, uintptr_t scratch, int device, uintptr_t stream) {
          const Transform t = transform(image, coeffs, levels, mode, factor, stacked);
          if (!is_empty(t))
            litevae::haar_synthesis_cuda(t, reinterpret_cast<void*>(scratch), device,
                                         reinterpret_cast<void*>(stream));
        });
#endif
}
