// Registers the 3x3 convolution and its gradients.
#include "../common/bindings.h"

#include <initializer_list>

#include "../common/isa.h"
#include "conv3x3.h"

LITEVAE_DISPATCH_ISA(conv3x3_forward, conv3x3::Forward)
LITEVAE_DISPATCH_ISA(conv3x3_float32_forward, conv3x3::Forward)
LITEVAE_DISPATCH_ISA(conv3x3_weight_gradient, conv3x3::WeightGradient)
LITEVAE_DISPATCH_ISA(conv3x3_float32_weight_gradient, conv3x3::WeightGradient)

namespace litevae {
namespace {

// Whether the kernels that multiply in bfloat16 serve a call with these activations.
bool multiplies_bf16(std::initializer_list<const TensorView*> activations) {
  if (current_isa != Isa::avx512bf16) return false;
  for (const TensorView* t : activations)
    if (t->data != nullptr && (t->dtype != DType::bf16 || (t->size[1] > 1 && t->stride[1] != 1)))
      return false;
  return true;
}

void run_forward(const conv3x3::Forward& call, int threads) {
  multiplies_bf16({&call.x, &call.residual, &call.y}) ? conv3x3_forward(call, threads)
                                                      : conv3x3_float32_forward(call, threads);
}

void check_sizes(const TensorView& weight, const TensorView& x, const TensorView& y) {
  check_fits(weight.size[1] == x.size[1] && weight.size[1] > 0 && weight.size[2] == 3 && weight.size[3] == 3,
             "weight");
  check_fits(same_size(y, x, weight.size[0]), "y");
}

void forward(const TensorView& x, bool silu, const TensorView& weight, const OptionalView& bias,
             const OptionalView& residual, const TensorView& y, int threads) {
  check_sizes(weight, x, y);
  if (bias) check_fits(bias->size[1] == weight.size[0], "bias");
  if (residual) check_fits(same_size(*residual, y), "residual");
  const TensorView none{};
  run_forward({x, silu, weight, false, bias.value_or(none), residual.value_or(none), y}, threads);
}

void input_gradient(const TensorView& grad, const TensorView& weight, const TensorView& grad_x, int threads) {
  check_sizes(weight, grad_x, grad);
  run_forward({grad, false, weight, true, {}, {}, grad_x}, threads);
}

void weight_gradient(const TensorView& x, const TensorView& grad, const TensorView& grad_weight,
                     int threads) {
  check_sizes(grad_weight, x, grad);
  const conv3x3::WeightGradient call{x, grad, grad_weight};
  multiplies_bf16({&x, &grad}) ? conv3x3_weight_gradient(call, threads)
                               : conv3x3_float32_weight_gradient(call, threads);
}

}  // namespace

void bind_conv3x3(py::module_& m) {
  m.def("has_amx_bf16", &has_amx_bf16);
  m.def("conv3x3_cpu", &forward, WithoutGil());
  m.def("conv3x3_input_gradient_cpu", &input_gradient, WithoutGil());
  m.def("conv3x3_weight_gradient_cpu", &weight_gradient, WithoutGil());
}

}  // namespace litevae
