// Registers weight modulation and its gradient.
#include "../common/bindings.h"

#include "../common/isa.h"
#include "smc.h"

LITEVAE_DISPATCH_ISA(modulate_weight_forward, smc::Forward)
LITEVAE_DISPATCH_ISA(modulate_weight_backward, smc::Backward)

namespace litevae {
namespace {

// `modulated` is the modulated weight or its gradient. The norm has the type of the arithmetic, which is
// double if either weight is.
smc::Inputs make_inputs(const TensorView& weight, const TensorView& modulated, const TensorView& scale,
                        const OptionalView& gain, const TensorView& norm, double eps) {
  const smc::Inputs in{weight, scale, gain.value_or(TensorView{}), norm, eps};
  check_fits(weight.size[1] > 0 && scale.size[1] > 0 && scale.size[1] % weight.size[1] == 0 &&
                 weight.size[0] % in.groups() == 0,
             "scale");
  const bool in_double = weight.dtype == DType::f64 || modulated.dtype == DType::f64;
  check_fits(norm.size[1] == weight.size[0] &&
                 (norm.dtype == DType::f64 || (norm.dtype == DType::f32 && !in_double)),
             "norm");
  return in;
}

smc::Forward make_forward(const TensorView& weight, const TensorView& scale, const OptionalView& gain,
                          const TensorView& modulated, const TensorView& norm, double eps) {
  check_fits(same_size(weight, modulated), "modulated");
  return {make_inputs(weight, modulated, scale, gain, norm, eps), modulated};
}

smc::Backward make_backward(const TensorView& grad, const TensorView& weight, const TensorView& scale,
                            const OptionalView& gain, const TensorView& norm, const TensorView& grad_weight,
                            const TensorView& grad_scale, const OptionalView& grad_gain, double eps) {
  check_fits(same_size(weight, grad), "grad");
  check_fits(same_size(weight, grad_weight) && weight.dtype == grad_weight.dtype, "grad_weight");
  check_fits(same_size(scale, grad_scale), "grad_scale");
  check_fits(gain.has_value() == grad_gain.has_value(), "grad_gain");
  return {make_inputs(weight, grad, scale, gain, norm, eps), grad, grad_weight, grad_scale,
          grad_gain.value_or(TensorView{})};
}

}  // namespace

void bind_smc(py::module_& m) {
  m.def(
      "modulate_weight_cpu",
      [](const TensorView& weight, const TensorView& scale, const OptionalView& gain,
         const TensorView& modulated, const TensorView& norm, double eps, int threads) {
        modulate_weight_forward(make_forward(weight, scale, gain, modulated, norm, eps), threads);
      },
      WithoutGil());
  m.def(
      "modulate_weight_backward_cpu",
      [](const TensorView& grad, const TensorView& weight, const TensorView& scale, const OptionalView& gain,
         const TensorView& norm, const TensorView& grad_weight, const TensorView& grad_scale,
         const OptionalView& grad_gain, double eps, int threads) {
        modulate_weight_backward(
            make_backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain, eps), threads);
      },
      WithoutGil());
#ifdef LITEVAE_CUDA
  m.def("modulate_weight_scratch_bytes", &modulate_weight_scratch_bytes);
  m.def("modulate_weight_cuda",
        [](const TensorView& weight, const TensorView& scale, const OptionalView& gain,
           const TensorView& modulated, const TensorView& norm, double eps, int device, uintptr_t stream) {
          modulate_weight_forward_cuda(make_forward(weight, scale, gain, modulated, norm, eps), device,
                                       pointer(stream));
        });
  m.def(
      "modulate_weight_backward_cuda",
      [](const TensorView& grad, const TensorView& weight, const TensorView& scale, const OptionalView& gain,
         const TensorView& norm, const TensorView& grad_weight, const TensorView& grad_scale,
         const OptionalView& grad_gain, double eps, uintptr_t scratch, int device, uintptr_t stream) {
        modulate_weight_backward_cuda(
            make_backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain, eps),
            pointer(scratch), device, pointer(stream));
      });
#endif
}

}  // namespace litevae
