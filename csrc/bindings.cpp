// The one file that knows Python. Tensors arrive as (address, dtype code, sizes, strides); the Python side
// has validated them and allocated the outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "conv3x3/conv3x3.h"
#include "group_norm_silu/group_norm_silu.h"
#include "haar/haar.h"
#include "smc/smc.h"

namespace py = pybind11;
using litevae::TensorView;
using litevae::haar::Transform;

LITEVAE_DISPATCH_ISA(conv3x3_forward, (const conv3x3::Forward& call, int threads), call, threads)
LITEVAE_DISPATCH_ISA(conv3x3_weight_gradient, (const conv3x3::WeightGradient& call, int threads), call,
                     threads)
LITEVAE_DISPATCH_ISA(haar_analysis, (const haar::Transform& call, int threads), call, threads)
LITEVAE_DISPATCH_ISA(haar_synthesis, (const haar::Transform& call, int threads), call, threads)
LITEVAE_DISPATCH_ISA(group_norm_silu_forward, (const group_norm_silu::Forward& call, int threads), call,
                     threads)
LITEVAE_DISPATCH_ISA(group_norm_silu_backward, (const group_norm_silu::Backward& call, int threads), call,
                     threads)
LITEVAE_DISPATCH_ISA(modulate_weight_forward, (const smc::Forward& call, int threads), call, threads)
LITEVAE_DISPATCH_ISA(modulate_weight_backward, (const smc::Backward& call, int threads), call, threads)

#ifdef LITEVAE_CUDA
namespace litevae {
void haar_analysis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);
void haar_synthesis_cuda(const haar::Transform& call, void* scratch, int device, void* stream);
int64_t group_norm_silu_scratch_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t element);
void group_norm_silu_forward_cuda(const group_norm_silu::Forward& call, void* scratch, int device,
                                  void* stream);
void group_norm_silu_backward_cuda(const group_norm_silu::Backward& call, void* scratch, int device,
                                   void* stream);
void modulate_weight_forward_cuda(const smc::Forward& call, int device, void* stream);
void modulate_weight_backward_cuda(const smc::Backward& call, void* scratch, int device, void* stream);
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

using MaybeView = std::optional<TensorView>;

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string(what) + " does not fit the other tensors");
}

bool same_size(const TensorView& a, const TensorView& b) { return std::equal(a.size, a.size + 4, b.size); }

litevae::group_norm_silu::Inputs norm_inputs(const TensorView& x, const MaybeView& skip,
                                             const MaybeView& weight, const MaybeView& bias, uintptr_t stats,
                                             int64_t groups) {
  litevae::group_norm_silu::Inputs in{};
  in.x = x, in.stats = reinterpret_cast<double*>(stats), in.groups = groups;
  if (skip) {
    in.skip = *skip;
    expect(skip->dtype == x.dtype && skip->size[0] == x.size[0] && skip->size[2] == x.size[2] &&
               skip->size[3] == x.size[3],
           "skip");
  }
  if (weight) in.weight = *weight, expect(weight->size[1] == in.channels(), "weight");
  if (bias) in.bias = *bias, expect(bias->size[1] == in.channels(), "bias");
  if (groups < 1 || in.channels() % groups)
    throw std::invalid_argument("groups do not divide the channels: " + std::to_string(groups));
  return in;
}

litevae::group_norm_silu::Forward norm_forward(const TensorView& x, const MaybeView& skip,
                                               const MaybeView& weight, const MaybeView& bias,
                                               const TensorView& y, uintptr_t stats, int64_t groups,
                                               double eps) {
  const auto in = norm_inputs(x, skip, weight, bias, stats, groups);
  expect(y.dtype == x.dtype && y.size[0] == x.size[0] && y.size[1] == in.channels() &&
             y.size[2] == x.size[2] && y.size[3] == x.size[3],
         "y");
  return {in, y, eps};
}

litevae::group_norm_silu::Backward norm_backward(const TensorView& grad, const TensorView& x,
                                                 const MaybeView& skip, const MaybeView& weight,
                                                 const MaybeView& bias, uintptr_t stats,
                                                 const TensorView& grad_x, const MaybeView& grad_skip,
                                                 const MaybeView& grad_weight, const MaybeView& grad_bias,
                                                 int64_t groups) {
  const auto in = norm_inputs(x, skip, weight, bias, stats, groups);
  expect(grad.dtype == x.dtype && grad.size[0] == x.size[0] && grad.size[1] == in.channels() &&
             grad.size[2] == x.size[2] && grad.size[3] == x.size[3],
         "grad");
  expect(same_size(grad_x, x) && grad_x.dtype == x.dtype, "grad_x");
  litevae::group_norm_silu::Backward b{in, grad, grad_x, {}, {}, {}};
  if (grad_skip) b.grad_skip = *grad_skip, expect(skip && same_size(*skip, *grad_skip), "grad_skip");
  if (grad_weight)
    b.grad_weight = *grad_weight, expect(weight && same_size(*weight, *grad_weight), "grad_weight");
  if (grad_bias) b.grad_bias = *grad_bias, expect(bias && same_size(*bias, *grad_bias), "grad_bias");
  return b;
}

// `other` is the modulated weight, or its gradient. Their arithmetic is the norm's: double for doubles.
litevae::smc::Inputs smc_inputs(const TensorView& weight, const TensorView& other, const TensorView& scale,
                                const MaybeView& gain, const TensorView& norm, double eps) {
  litevae::smc::Inputs in{weight, scale, gain.value_or(TensorView{}), norm, eps};
  expect(weight.size[1] > 0 && scale.size[1] > 0 && scale.size[1] % weight.size[1] == 0 &&
             weight.size[0] % in.groups() == 0,
         "scale");
  const bool doubles = weight.dtype == litevae::DType::f64 || other.dtype == litevae::DType::f64;
  expect(norm.size[1] == weight.size[0] &&
             (norm.dtype == litevae::DType::f64 || (norm.dtype == litevae::DType::f32 && !doubles)),
         "norm");
  return in;
}

litevae::smc::Forward smc_forward(const TensorView& weight, const TensorView& scale, const MaybeView& gain,
                                  const TensorView& modulated, const TensorView& norm, double eps) {
  expect(same_size(weight, modulated), "modulated");
  return {smc_inputs(weight, modulated, scale, gain, norm, eps), modulated};
}

litevae::smc::Backward smc_backward(const TensorView& grad, const TensorView& weight, const TensorView& scale,
                                    const MaybeView& gain, const TensorView& norm,
                                    const TensorView& grad_weight, const TensorView& grad_scale,
                                    const MaybeView& grad_gain, double eps) {
  expect(same_size(weight, grad), "grad");
  expect(same_size(weight, grad_weight) && weight.dtype == grad_weight.dtype, "grad_weight");
  expect(same_size(scale, grad_scale), "grad_scale");
  expect(gain.has_value() == grad_gain.has_value(), "grad_gain");
  return {smc_inputs(weight, grad, scale, gain, norm, eps), grad, grad_weight, grad_scale,
          grad_gain.value_or(TensorView{})};
}

void expect_3x3(const TensorView& weight, const TensorView& x, const TensorView& y) {
  expect(weight.size[1] == x.size[1] && weight.size[1] > 0 && weight.size[2] == 3 && weight.size[3] == 3,
         "weight");
  expect(y.size[0] == x.size[0] && y.size[1] == weight.size[0] && y.size[2] == x.size[2] &&
             y.size[3] == x.size[3],
         "y");
}

litevae::conv3x3::Forward conv3x3_forward(const TensorView& x, bool silu, const TensorView& weight,
                                          const MaybeView& bias, const MaybeView& residual,
                                          const TensorView& y) {
  expect_3x3(weight, x, y);
  if (bias) expect(bias->size[1] == weight.size[0], "bias");
  if (residual) expect(same_size(*residual, y), "residual");
  return {x, silu, weight, false, bias.value_or(TensorView{}), residual.value_or(TensorView{}), y};
}

bool is_empty(const Transform& t) { return t.batch * t.channels * t.height * t.width == 0; }

}  // namespace

PYBIND11_MODULE(litevae_core, m) {
  m.doc() = "litevae's compiled core: raw addresses in, no tensors";
  // Raised with every change of these functions' arguments or meaning; litevae_kernels/backend.py names the
  // same.
  m.attr("interface") = 4;
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

  m.def("has_amx_bf16", &litevae::has_amx_bf16);
  m.def("conv3x3_cpu", [](const TensorView& x, bool silu, const TensorView& weight, const MaybeView& bias,
                          const MaybeView& residual, const TensorView& y, int threads) {
    const auto call = conv3x3_forward(x, silu, weight, bias, residual, y);
    py::gil_scoped_release release;
    litevae::conv3x3_forward(isa, call, threads);
  });
  m.def("conv3x3_input_gradient_cpu",
        [](const TensorView& grad, const TensorView& weight, const TensorView& grad_x, int threads) {
          expect_3x3(weight, grad_x, grad);
          const litevae::conv3x3::Forward call{grad, false, weight, true, {}, {}, grad_x};
          py::gil_scoped_release release;
          litevae::conv3x3_forward(isa, call, threads);
        });
  m.def("conv3x3_weight_gradient_cpu",
        [](const TensorView& x, const TensorView& grad, const TensorView& grad_weight, int threads) {
          expect_3x3(grad_weight, x, grad);
          py::gil_scoped_release release;
          litevae::conv3x3_weight_gradient(isa, {x, grad, grad_weight}, threads);
        });
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
  m.def("group_norm_silu_cpu",
        [](const TensorView& x, const MaybeView& skip, const MaybeView& weight, const MaybeView& bias,
           const TensorView& y, uintptr_t stats, int64_t groups, double eps, int threads) {
          const auto call = norm_forward(x, skip, weight, bias, y, stats, groups, eps);
          py::gil_scoped_release release;
          litevae::group_norm_silu_forward(isa, call, threads);
        });
  m.def("group_norm_silu_backward_cpu",
        [](const TensorView& grad, const TensorView& x, const MaybeView& skip, const MaybeView& weight,
           const MaybeView& bias, uintptr_t stats, const TensorView& grad_x, const MaybeView& grad_skip,
           const MaybeView& grad_weight, const MaybeView& grad_bias, int64_t groups, int threads) {
          const auto call = norm_backward(grad, x, skip, weight, bias, stats, grad_x, grad_skip, grad_weight,
                                          grad_bias, groups);
          py::gil_scoped_release release;
          litevae::group_norm_silu_backward(isa, call, threads);
        });
  m.def("modulate_weight_cpu",
        [](const TensorView& weight, const TensorView& scale, const MaybeView& gain,
           const TensorView& modulated, const TensorView& norm, double eps, int threads) {
          const auto call = smc_forward(weight, scale, gain, modulated, norm, eps);
          py::gil_scoped_release release;
          litevae::modulate_weight_forward(isa, call, threads);
        });
  m.def("modulate_weight_backward_cpu",
        [](const TensorView& grad, const TensorView& weight, const TensorView& scale, const MaybeView& gain,
           const TensorView& norm, const TensorView& grad_weight, const TensorView& grad_scale,
           const MaybeView& grad_gain, double eps, int threads) {
          const auto call =
              smc_backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain, eps);
          py::gil_scoped_release release;
          litevae::modulate_weight_backward(isa, call, threads);
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
  m.def("group_norm_silu_scratch_bytes", &litevae::group_norm_silu_scratch_bytes);
  m.def("group_norm_silu_cuda",
        [](const TensorView& x, const MaybeView& skip, const MaybeView& weight, const MaybeView& bias,
           const TensorView& y, uintptr_t stats, int64_t groups, double eps, uintptr_t scratch, int device,
           uintptr_t stream) {
          litevae::group_norm_silu_forward_cuda(norm_forward(x, skip, weight, bias, y, stats, groups, eps),
                                                reinterpret_cast<void*>(scratch), device,
                                                reinterpret_cast<void*>(stream));
        });
  m.def("group_norm_silu_backward_cuda",
        [](const TensorView& grad, const TensorView& x, const MaybeView& skip, const MaybeView& weight,
           const MaybeView& bias, uintptr_t stats, const TensorView& grad_x, const MaybeView& grad_skip,
           const MaybeView& grad_weight, const MaybeView& grad_bias, int64_t groups, uintptr_t scratch,
           int device, uintptr_t stream) {
          const auto call = norm_backward(grad, x, skip, weight, bias, stats, grad_x, grad_skip, grad_weight,
                                          grad_bias, groups);
          litevae::group_norm_silu_backward_cuda(call, reinterpret_cast<void*>(scratch), device,
                                                 reinterpret_cast<void*>(stream));
        });
  m.def("modulate_weight_cuda",
        [](const TensorView& weight, const TensorView& scale, const MaybeView& gain,
           const TensorView& modulated, const TensorView& norm, double eps, int device, uintptr_t stream) {
          litevae::modulate_weight_forward_cuda(smc_forward(weight, scale, gain, modulated, norm, eps),
                                                device, reinterpret_cast<void*>(stream));
        });
  m.def("modulate_weight_backward_cuda",
        [](const TensorView& grad, const TensorView& weight, const TensorView& scale, const MaybeView& gain,
           const TensorView& norm, const TensorView& grad_weight, const TensorView& grad_scale,
           const MaybeView& grad_gain, double eps, uintptr_t scratch, int device, uintptr_t stream) {
          const auto call =
              smc_backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain, eps);
          litevae::modulate_weight_backward_cuda(call, reinterpret_cast<void*>(scratch), device,
                                                 reinterpret_cast<void*>(stream));
        });
#endif
}
