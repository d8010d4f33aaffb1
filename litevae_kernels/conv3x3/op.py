"""Registration of the 3x3 convolution and its gradients with PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from litevae_kernels.arithmetic import current_isa
from litevae_kernels.conv3x3 import gpu, native, reference
from litevae_kernels.conv3x3.addition import empty_statistics
from litevae_kernels.conv3x3.dispatch import WIDEST_VECTOR, is_small
from litevae_kernels.group_norm_silu.native import statistics
from litevae_kernels.tensors import (
    differentiable_gradients,
    empty_output,
    in_inference_mode,
    in_layout,
    is_plain,
)


def _channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1


def _no_autocast() -> torch.autocast:
    """Disables autocast, which may be on in a backward pass whose forward pass ran without it."""
    return torch.autocast("cpu", enabled=False)


def _is_small(x: Tensor, weight: Tensor) -> bool:
    return is_small(x.dtype, current_isa(), min(weight.shape[:2]), x.shape[2] * x.shape[3])


torch.library.define(
    "litevae::conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool silu_input) -> Tensor",
)
torch.library.define(
    "litevae::norm_silu_conv3x3",
    "(Tensor x, Tensor? skip, int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
)
# For a GPU only: the statistics of the inputs may be given, and those of the result are returned if `measure`.
torch.library.define(
    "litevae::measured_norm_silu_conv3x3",
    "(Tensor x, Tensor? skip, int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
    "Tensor? bias, Tensor? residual, Tensor[]? statistics, bool measure) -> (Tensor y, Tensor measured)",
)
torch.library.define(
    "litevae::conv3x3_input_gradient", "(Tensor grad, Tensor weight, bool channels_last) -> Tensor"
)
torch.library.define("litevae::conv3x3_weight_gradient", "(Tensor x, Tensor grad, Tensor weight) -> Tensor")


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    innermost = _channels_innermost(x)
    y = empty_output(x, weight.shape[0], innermost)
    # Autocast rounds the parameters; the kernels round the weight themselves.
    bias = None if bias is None else bias.to(x.dtype)
    if _is_small(x, weight):
        with _no_autocast():
            return y.copy_(reference.forward(x, weight.to(x.dtype), bias, residual, silu_input))
    residual = None if residual is None else in_layout(residual.to(x.dtype), innermost)
    native.forward(in_layout(x, innermost), weight, bias, residual, silu_input, y)
    return y


torch.library.impl("litevae::conv3x3", "CPU", _forward)
torch.library.impl("litevae::conv3x3", "CUDA", gpu.forward)
torch.library.impl("litevae::norm_silu_conv3x3", "CUDA", gpu.norm_forward)
torch.library.impl("litevae::measured_norm_silu_conv3x3", "CUDA", gpu.measured_norm_forward)


@torch.library.impl("litevae::norm_silu_conv3x3", "CPU")
def _norm_forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Runs two operators where the float32 kernels would divide a vector of channels between `x` and `skip`."""
    if _is_small(x, weight) or (skip is not None and x.shape[1] % WIDEST_VECTOR):
        norm = (norm_weight, norm_bias, num_groups, eps, "native")
        h = torch.ops.litevae.group_norm_silu(x, skip, *norm)[0]
        return torch.ops.litevae.conv3x3(h, weight, bias, residual, False)
    innermost = _channels_innermost(x)
    y = empty_output(x, weight.shape[0], innermost)
    if y.numel() == 0:
        return y
    x, skip = in_layout(x, innermost), None if skip is None else in_layout(skip, innermost)
    stats = torch.empty((x.shape[0], num_groups, 2), dtype=torch.float64)
    statistics(x, skip, stats, num_groups, eps)
    bias = None if bias is None else bias.to(x.dtype)
    residual = None if residual is None else in_layout(residual.to(x.dtype), innermost)
    native.norm_forward(x, skip, norm_weight, norm_bias, stats, weight, bias, residual, y)
    return y


@torch.library.impl("litevae::conv3x3_input_gradient", "CPU")
def _input_gradient(grad: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    grad_x = empty_output(grad, weight.shape[1], channels_last)
    if _is_small(grad, weight):
        with _no_autocast():
            return grad_x.copy_(reference.input_gradient(grad, weight.to(grad.dtype)))
    native.input_gradient(in_layout(grad, channels_last), weight, grad_x)
    return grad_x


@torch.library.impl("litevae::conv3x3_weight_gradient", "CPU")
def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient in the dtype and memory format of `weight`, whose values do not matter."""
    grad_weight = torch.empty_like(weight)
    if x.numel() == 0:
        return grad_weight.zero_()
    if _is_small(x, weight):
        with _no_autocast():
            return grad_weight.copy_(reference.weight_gradient(x, grad, weight.shape))
    innermost = _channels_innermost(x)
    native.weight_gradient(in_layout(x, innermost), in_layout(grad, innermost), grad_weight)
    return grad_weight


@torch.library.register_fake("litevae::conv3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool) -> Tensor:
    return empty_output(x, weight.shape[0], _channels_innermost(x))


@torch.library.register_fake("litevae::norm_silu_conv3x3")
def _(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return empty_output(x, weight.shape[0], _channels_innermost(x))


@torch.library.register_fake("litevae::measured_norm_silu_conv3x3")
def _(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Sequence[Tensor] | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    outputs = weight.shape[0]
    return empty_output(x, outputs, _channels_innermost(x)), empty_statistics(x, outputs, measure)


@torch.library.register_fake("litevae::conv3x3_input_gradient")
def _(grad: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    return empty_output(grad, weight.shape[1], channels_last)


@torch.library.register_fake("litevae::conv3x3_weight_gradient")
def _(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _flops(x: torch.Size, weight: torch.Size) -> int:
    """Returns the count of a direct convolution, whatever serves the call; each gradient has the same count."""
    return 2 * x[0] * x[2] * x[3] * weight.numel()


@register_flop_formula([torch.ops.litevae.conv3x3, torch.ops.litevae.conv3x3_input_gradient])
def _(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size | None = None, **__: Any) -> int:
    return _flops(x, weight)


@register_flop_formula([torch.ops.litevae.norm_silu_conv3x3, torch.ops.litevae.measured_norm_silu_conv3x3])
def _(
    x: torch.Size,
    skip: torch.Size | None,
    num_groups: int,
    norm_weight: torch.Size | None,
    norm_bias: torch.Size | None,
    eps: float,
    weight: torch.Size,
    *_: Any,
    out_shape: torch.Size | None = None,
) -> int:
    return _flops(x, weight)


@register_flop_formula(torch.ops.litevae.conv3x3_weight_gradient)
def _(x: torch.Size, grad: torch.Size, weight: torch.Size, *, out_shape: torch.Size | None = None) -> int:
    return _flops(x, weight)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        silu_input: bool,
    ) -> Tensor:
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, weight)
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, residual)]
        return torch.ops.litevae.conv3x3(x, weight, bias, residual, silu_input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_residual = None
        if needs_x or needs_weight:
            x, weight = ctx.saved_tensors
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # A derivative of this derivative is needed: autograd of plain PyTorch has all orders.
                grad_x, grad_weight = differentiable_gradients(
                    lambda x, weight: reference.forward(x, weight.to(x.dtype), None, None, False),
                    [x, weight],
                    ctx.needs_input_grad[:2],
                    grad,
                )
            else:
                if needs_x:
                    grad_x = torch.ops.litevae.conv3x3_input_gradient(grad, weight, _channels_innermost(x))
                if needs_weight:
                    grad_weight = torch.ops.litevae.conv3x3_weight_gradient(x, grad, weight)
        bias_dtype, residual_dtype = ctx.dtypes
        if needs_bias:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias_dtype)
        if needs_residual:
            grad_residual = grad.to(residual_dtype)
        return grad_x, grad_weight, grad_bias, grad_residual, None


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """Differentiable `litevae::conv3x3`; with `silu_input`, only bias and residual have gradients."""
    if in_inference_mode():
        direct = x.is_cpu and is_plain(x, weight, bias, residual)
        forward = _forward if direct else torch.ops.litevae.conv3x3
        return forward(x, weight, bias, residual, silu_input)
    return _Conv3x3.apply(x, weight, bias, residual, silu_input)
