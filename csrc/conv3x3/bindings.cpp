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
  multiplies_bf16({&call.x, &call.norm.skip, &call.residual, &call.y})
      ? conv3x3_forward(call, threads)
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
  run_forward({x, {}, silu, weight, false, bias.value_or(none), residual.value_or(none), y}, threads);
}

// The convolution of the SiLU of a group normalisation.
void norm_forward(const TensorView& x, const OptionalView& skip, const OptionalView& norm_weight,
                  const OptionalView& norm_bias, uintptr_t stats, int64_t groups, const TensorView& weight,
                  const OptionalView& bias, const OptionalView& residual, const TensorView& y, int threads) {
  TensorView whole = x;
  if (skip) whole.size[1] += skip->size[1];
  check_sizes(weight, whole, y);
  if (skip) check_fits(skip->dtype == x.dtype && same_size(*skip, x, skip->size[1]), "skip");
  if (norm_weight) check_fits(norm_weight->size[1] == whole.size[1], "norm_weight");
  if (norm_bias) check_fits(norm_bias->size[1] == whole.size[1], "norm_bias");
  if (groups < 1 || whole.size[1] % groups)
    throw std::invalid_argument("groups do not divide the channels: " + std::to_string(groups));
  if (bias) check_fits(bias->size[1] == weight.size[0], "bias");
  if (residual) check_fits(same_size(*residual, y), "residual");
  const TensorView none{};
  const conv3x3::Norm norm{skip.value_or(none), norm_weight.value_or(none), norm_bias.value_or(none),
                           pointer<const double>(stats), groups};
  run_forward({x, norm, true, weight, false, bias.value_or(none), residual.value_or(none), y}, threads);
}

void input_gradient(const TensorView& grad, const TensorView& weight, const TensorView& grad_x, int threads) {
  check_sizes(weight, grad_x, grad);
  run_forward({grad, {}, false, weight, true, {}, {}, grad_x}, threads);
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
  m.def("norm_silu_conv3x3_cpu", &norm_forward, WithoutGil());
  m.def("conv3x3_input_gradient_cpu", &input_gradient, WithoutGil());
  m.def("conv3x3_weight_gradient_cpu", &weight_gradient, WithoutGil());
}

}  // namespace litevae
