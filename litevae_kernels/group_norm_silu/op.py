"""Registration of GroupNorm+SiLU with PyTorch, and its derivatives.

The forward pass also returns the statistics that the backward pass needs: the mean and 1 / sqrt(var + eps) of each
group, (N, num_groups, 2). They are float64, so that the difference x - mean keeps its digits at any mean.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from litevae_kernels.group_norm_silu import native, reference
from litevae_kernels.tensors import (
    differentiable_gradients,
    empty_output,
    in_inference_mode,
    is_channels_last,
    is_plain,
    memory_format_of,
)


def backend_module(name: str) -> ModuleType:
    """Returns the module with the kernels of the backend `name`."""
    if name == "triton":
        from litevae_kernels.group_norm_silu import triton  # some platforms have no Triton

        return triton
    return native


def _empty_like(x: Tensor, channels: int) -> Tensor:
    channels_last = is_channels_last(x)
    if channels == x.shape[1]:
        return torch.empty_like(x, memory_format=memory_format_of(channels_last))
    return empty_output(x, channels, channels_last)


def _result(x: Tensor, skip: Tensor | None) -> Tensor:
    return _empty_like(x, x.shape[1] + (0 if skip is None else skip.shape[1]))


def _outputs(x: Tensor, skip: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor]:
    stats = torch.empty((x.shape[0], num_groups, 2), dtype=torch.float64, device=x.device)
    return _result(x, skip), stats


def _gradients(
    x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns empty gradients of the inputs. Those of missing inputs have no elements, as None is not allowed."""
    none = [0]
    return (
        _empty_like(x, x.shape[1]),
        x.new_empty(none) if skip is None else _empty_like(skip, skip.shape[1]),
        x.new_empty(none)
        if weight is None
        else torch.empty_like(weight, memory_format=torch.contiguous_format),
        x.new_empty(none) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
    )


torch.library.define(
    "litevae::group_norm_silu",
    "(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, int num_groups, float eps, str backend, "
    "Tensor? offset=None, Tensor[]? statistics=None) -> (Tensor y, Tensor stats)",
)
torch.library.define(
    "litevae::group_norm_silu_",
    "(Tensor(a!) x, Tensor? weight, Tensor? bias, int num_groups, float eps) -> ()",
)
torch.library.define(
    "litevae::group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor stats, int num_groups, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    backend: str,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    y, stats = _outputs(x, skip, num_groups)
    if y.numel() == 0:
        return y, stats.zero_()
    backend_module(backend).forward(
        x, skip, weight, bias, y, stats, num_groups, eps, offset, statistics or ()
    )
    return y, stats


@torch.library.impl("litevae::group_norm_silu_", "CPU")
def _forward_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> None:
    # The kernel's second pass reads each value before it writes the result in its place.
    native.forward(x, None, weight, bias, x, None, num_groups, eps)


def _backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    num_groups: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _gradients(x, skip, weight, bias)
    if grad.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    present = [None if t is None else g for t, g in zip((x, skip, weight, bias), gradients, strict=True)]
    backend_module(backend).backward(grad, x, skip, weight, bias, stats, *present, num_groups)
    return gradients


for _key in ("CPU", "CUDA"):
    torch.library.impl("litevae::group_norm_silu", _key, _forward)
    torch.library.impl("litevae::group_norm_silu_backward", _key, _backward)


@torch.library.register_fake("litevae::group_norm_silu")
def _(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    backend: str,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, skip, num_groups)


@torch.library.register_fake("litevae::group_norm_silu_")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float) -> None:
    return None


@torch.library.register_fake("litevae::group_norm_silu_backward")
def _(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    num_groups: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, skip, weight, bias)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        backend: str,
    ) -> Tensor:
        y, stats = torch.ops.litevae.group_norm_silu(x, skip, weight, bias, num_groups, eps, backend)
        ctx.save_for_backward(x, skip, weight, bias, stats)
        ctx.rest = (num_groups, eps, backend)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *inputs, stats = ctx.saved_tensors
        num_groups, eps, backend = ctx.rest
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the caller wants a derivative of this derivative, and autograd of plain PyTorch has all orders
            gradients = differentiable_gradients(
                lambda x, s, w, b: reference.forward(x, s, w, b, num_groups, eps), inputs, needed, grad
            )
        else:
            computed = torch.ops.litevae.group_norm_silu_backward(grad, *inputs, stats, num_groups, backend)
            gradients = [g if need else None for g, need in zip(computed, needed, strict=True)]
        return (*gradients, None, None, None)


def group_norm_silu(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    backend: str,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """Returns the result of `litevae::group_norm_silu`, differentiable and without the statistics.

    While gradients are recorded, `offset` is added in a pass of its own, in x's dtype, and `statistics` are not used.
    """
    if in_inference_mode():
        if backend != "native" or not is_plain(x, skip, weight, bias, offset, *statistics):
            op = torch.ops.litevae.group_norm_silu
            return op(x, skip, weight, bias, num_groups, eps, backend, offset, statistics)[0]
        y = _result(x, skip)
        if y.numel():
            native.forward(x, skip, weight, bias, y, None, num_groups, eps, offset, statistics)
        return y
    if (statistics or offset is not None) and not torch.is_grad_enabled():
        op = torch.ops.litevae.group_norm_silu
        return op(x, skip, weight, bias, num_groups, eps, backend, offset, statistics)[0]
    if offset is not None:
        offset = offset.to(x.dtype)[:, None, None]
        if skip is not None:
            skip = skip + offset[x.shape[1] :]
        x = x + offset[: x.shape[1]]
    return _GroupNormSiLU.apply(x, skip, weight, bias, num_groups, eps, backend)


def can_overwrite(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Returns whether `group_norm_silu_` serves `x` (N, C, H, W) and the parameters."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    return (
        not torch.compiler.is_compiling()  # The compiler itself reuses memory.
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0  # A tangent would be lost.
        and x.device.type == "cpu"
        # A negation may be pending where the kernel would write, and the result of a subclass is one.
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors)
        and x.numel() > 0
        and x.is_contiguous(memory_format=memory_format_of(is_channels_last(x)))
    )


def group_norm_silu_(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    """Returns `x`, whose values it replaces by the result; without derivatives."""
    torch.ops.litevae.group_norm_silu_(x, weight, bias, num_groups, eps)
    torch.autograd.graph.increment_version(x)  # A backward pass that has saved x must fail.
    return x
