// Registers GroupNorm+SiLU, its gradient, and the addition that measures its input.
#include "../common/bindings.h"

#include "../common/isa.h"
#include "group_norm_silu.h"

LITEVAE_DISPATCH_ISA(group_norm_silu_forward, group_norm_silu::Forward)
LITEVAE_DISPATCH_ISA(group_norm_silu_backward, group_norm_silu::Backward)

namespace litevae {
namespace {

using group_norm_silu::Backward;
using group_norm_silu::Forward;
using group_norm_silu::Inputs;

Inputs make_inputs(const TensorView& x, const OptionalView& skip, const OptionalView& weight,
                   const OptionalView& bias, const OptionalView& offset, uintptr_t stats, int64_t groups) {
  Inputs in{};
  in.x = x, in.stats = pointer<double>(stats), in.groups = groups;
  if (skip) in.skip = *skip, check_fits(skip->dtype == x.dtype && same_size(*skip, x, skip->size[1]), "skip");
  if (weight) in.weight = *weight, check_fits(weight->size[1] == in.channels(), "weight");
  if (bias) in.bias = *bias, check_fits(bias->size[1] == in.channels(), "bias");
  if (offset) in.offset = *offset, check_fits(offset->size[1] == in.channels(), "offset");
  if (groups < 1 || in.channels() % groups)
    throw std::invalid_argument("groups do not divide the channels: " + std::to_string(groups));
  return in;
}

Forward make_forward(const TensorView& x, const OptionalView& skip, const OptionalView& weight,
                     const OptionalView& bias, const OptionalView& offset, const OptionalView& y,
                     uintptr_t stats, int64_t groups, double eps) {
  const Inputs in = make_inputs(x, skip, weight, bias, offset, stats, groups);
  if (y) check_fits(y->dtype == x.dtype && same_size(*y, x, in.channels()), "y");
  return {in, y.value_or(TensorView{}), eps};
}

Backward make_backward(const TensorView& grad, const TensorView& x, const OptionalView& skip,
                       const OptionalView& weight, const OptionalView& bias, uintptr_t stats,
                       const TensorView& grad_x, const OptionalView& grad_skip,
                       const OptionalView& grad_weight, const OptionalView& grad_bias, int64_t groups) {
  const Inputs in = make_inputs(x, skip, weight, bias, {}, stats, groups);
  check_fits(grad.dtype == x.dtype && same_size(grad, x, in.channels()), "grad");
  check_fits(same_size(grad_x, x) && grad_x.dtype == x.dtype, "grad_x");
  Backward b{in, grad, grad_x, {}, {}, {}};
  if (grad_skip) b.grad_skip = *grad_skip, check_fits(skip && same_size(*skip, *grad_skip), "grad_skip");
  if (grad_weight)
    b.grad_weight = *grad_weight, check_fits(weight && same_size(*weight, *grad_weight), "grad_weight");
  if (grad_bias) b.grad_bias = *grad_bias, check_fits(bias && same_size(*bias, *grad_bias), "grad_bias");
  return b;
}

#ifdef LITEVAE_CUDA
group_norm_silu::Addition make_addition(const TensorView& y, const std::vector<TensorView>& residuals,
                                        const std::vector<TensorView>& biases, uintptr_t statistics) {
  group_norm_silu::Addition sum{y, {}, {}, pointer<double>(statistics)};
  check_fits(residuals.size() <= 2, "residuals");
  check_fits(biases.size() <= 2, "biases");
  for (size_t i = 0; i < residuals.size(); ++i)
    sum.residuals[i] = residuals[i], check_fits(same_size(residuals[i], y), "residuals");
  for (size_t i = 0; i < biases.size(); ++i)
    sum.biases[i] = biases[i], check_fits(biases[i].size[1] == y.size[1], "biases");
  return sum;
}
#endif

}  // namespace

void bind_group_norm_silu(py::module_& m) {
  m.def(
      "group_norm_silu_cpu",
      [](const TensorView& x, const OptionalView& skip, const OptionalView& weight, const OptionalView& bias,
         const OptionalView& offset, const OptionalView& y, uintptr_t stats, int64_t groups, double eps,
         int threads) {
        Forward call = make_forward(x, skip, weight, bias, offset, y, stats, groups, eps);
        std::vector<double> unwanted;  // the kernel writes statistics even if the caller takes none
        if (!stats) unwanted.resize(2 * call.in.batch() * groups), call.in.stats = unwanted.data();
        group_norm_silu_forward(call, threads);
      },
      WithoutGil());
  m.def(
      "group_norm_silu_backward_cpu",
      [](const TensorView& grad, const TensorView& x, const OptionalView& skip, const OptionalView& weight,
         const OptionalView& bias, uintptr_t stats, const TensorView& grad_x, const OptionalView& grad_skip,
         const OptionalView& grad_weight, const OptionalView& grad_bias, int64_t groups, int threads) {
        group_norm_silu_backward(make_backward(grad, x, skip, weight, bias, stats, grad_x, grad_skip,
                                               grad_weight, grad_bias, groups),
                                 threads);
      },
      WithoutGil());
#ifdef LITEVAE_CUDA
  // `y` is the result or its gradient.
  m.def("group_norm_silu_scratch_bytes", [](const TensorView& y) {
    return group_norm_silu_scratch_bytes(y.size[0], y.size[1], y.size[2] * y.size[3], element_size(y.dtype));
  });
  m.def("group_norm_silu_cuda",
        [](const TensorView& x, const OptionalView& skip, const OptionalView& weight,
           const OptionalView& bias, const OptionalView& offset, const TensorView& y, uintptr_t stats,
           int64_t groups, double eps, uintptr_t x_given, uintptr_t skip_given, uintptr_t scratch, int device,
           uintptr_t stream, bool clusters) {
          Forward call = make_forward(x, skip, weight, bias, offset, y, stats, groups, eps);
          call.given[0] = pointer<double>(x_given), call.given[1] = pointer<double>(skip_given);
          check_fits(!x_given || !skip == !skip_given, "statistics");
          group_norm_silu_forward_cuda(call, pointer(scratch), device, pointer(stream), clusters);
        });
  m.def("group_norm_silu_backward_cuda",
        [](const TensorView& grad, const TensorView& x, const OptionalView& skip, const OptionalView& weight,
           const OptionalView& bias, uintptr_t stats, const TensorView& grad_x, const OptionalView& grad_skip,
           const OptionalView& grad_weight, const OptionalView& grad_bias, int64_t groups, uintptr_t scratch,
           int device, uintptr_t stream) {
          group_norm_silu_backward_cuda(make_backward(grad, x, skip, weight, bias, stats, grad_x, grad_skip,
                                                      grad_weight, grad_bias, groups),
                                        pointer(scratch), device, pointer(stream));
        });
  m.def("add_residuals_cuda", [](const TensorView& y, const std::vector<TensorView>& residuals,
                                 const std::vector<TensorView>& biases, uintptr_t statistics,
                                 uintptr_t scratch, int device, uintptr_t stream) {
    add_residuals_cuda(make_addition(y, residuals, biases, statistics), pointer(scratch), device,
                       pointer(stream));
  });
#ifdef LITEVAE_CLUSTERS
  // A card is a tuple (multiprocessors, bytes of shared memory per block, blocks per cluster).
  m.def("group_norm_silu_card", [](int device) {
    const group_norm_silu::Card card = group_norm_silu_card(device);
    return std::make_tuple(card.multiprocessors, card.shared, card.blocks);
  });
  // Returns the number of clusters, blocks per cluster and bytes of shared memory per block.
  m.def("group_norm_silu_clusters", [](const TensorView& x, const OptionalView& skip, const TensorView& y,
                                       int64_t groups, const std::tuple<int64_t, int64_t, int64_t>& card) {
    const auto [multiprocessors, shared, blocks] = card;
    const group_norm_silu::Clusters found = group_norm_silu_clusters(
        make_forward(x, skip, {}, {}, {}, y, 0, groups, 1.), {multiprocessors, shared, blocks});
    return std::make_tuple(found.count, found.blocks, found.shared);
  });
#endif
#endif
}

}  // namespace litevae
