"""Registration of the 3x3 convolution with PyTorch. For inference: it has no backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from litevae_kernels.conv3x3 import native


def _output(x: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, weight.shape[0], height, width),
        dtype=torch.bfloat16,
        device=x.device,
        memory_format=torch.channels_last,
    )


torch.library.define(
    "litevae::conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool silu_input) -> Tensor",
)


@torch.library.impl("litevae::conv3x3", "CPU")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    y = _output(x, weight)
    # as autocast does, though the kernel takes any dtype
    weight, bias = weight.to(torch.bfloat16), None if bias is None else bias.to(torch.bfloat16)
    x = _channels_innermost(x)
    residual = None if residual is None else _channels_innermost(residual)
    native.forward(x, weight, bias, residual, silu_input, y)
    return y


@torch.library.register_fake("litevae::conv3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool) -> Tensor:
    return _output(x, weight)


@register_flop_formula(torch.ops.litevae.conv3x3)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size | None = None, **__: Any) -> int:
    """A direct convolution's, so that counts do not depend on what serves it."""
    return 2 * x[0] * x[2] * x[3] * weight.numel()


def _channels_innermost(x: Tensor) -> Tensor:
    """`x`, or a copy, in bfloat16 with adjacent channels."""
    x = x.to(torch.bfloat16)
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


class _Conv3x3(torch.autograd.Function):
    """Nothing but a refusal of forward-mode tangents, which the operator would lose in silence."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return torch.ops.litevae.conv3x3(*args)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """`litevae::conv3x3`, to be called where no gradient is wanted."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.ops.litevae.conv3x3(x, weight, bias, residual, silu_input)
    return _Conv3x3.apply(x, weight, bias, residual, silu_input)
