"""Registration of weight modulation with PyTorch, and its derivatives.

The forward pass also returns each filter's norm sqrt(sum (scale * w)^2), (C_out), for the backward pass, in float32
(float64 if the weight or the result is).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from litevae_kernels.smc import native, reference
from litevae_kernels.tensors import (
    accumulate_dtype,
    differentiable_gradients,
    in_inference_mode,
    is_channels_last,
    is_plain,
    memory_format_of,
)


def _backend(name: str) -> ModuleType:
    if name == "triton":
        from litevae_kernels.smc import triton  # Triton is not available on every platform.

        return triton
    return native


def _empty_weight(weight: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=memory_format_of(channels_last))


def _outputs(weight: Tensor, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    norm = torch.empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype, dtype), device=weight.device)
    return _empty_weight(weight, dtype, channels_last), norm


def _gradients(weight: Tensor, scale: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised gradients; that of a missing gain is empty, because an operator cannot return None."""
    return (
        _empty_weight(weight, weight.dtype, is_channels_last(weight)),
        scale.new_empty(scale.shape),
        scale.new_empty([0]) if gain is None else gain.new_empty(gain.shape),
    )


torch.library.define(
    "litevae::modulate_weight",
    "(Tensor weight, Tensor scale, Tensor? gain, float eps, ScalarType dtype, bool channels_last, str backend) "
    "-> (Tensor modulated, Tensor norm)",
)
torch.library.define(
    "litevae::modulate_weight_backward",
    "(Tensor grad, Tensor weight, Tensor scale, Tensor? gain, Tensor norm, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)


def _forward(
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    modulated, norm = _outputs(weight, dtype, channels_last)
    _backend(backend).forward(weight, scale, gain, modulated, norm, eps)
    return modulated, norm


def _backward(
    grad: Tensor, weight: Tensor, scale: Tensor, gain: Tensor | None, norm: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = grad_weight, grad_scale, grad_gain = _gradients(weight, scale, gain)
    present = None if gain is None else grad_gain
    _backend(backend).backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, present, eps)
    return gradients


for _key in ("CPU", "CUDA"):
    torch.library.impl("litevae::modulate_weight", _key, _forward)
    torch.library.impl("litevae::modulate_weight_backward", _key, _backward)


@torch.library.register_fake("litevae::modulate_weight")
def _(
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _outputs(weight, dtype, channels_last)


@torch.library.register_fake("litevae::modulate_weight_backward")
def _(
    grad: Tensor, weight: Tensor, scale: Tensor, gain: Tensor | None, norm: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(weight, scale, gain)


class _ModulateWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        gain: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        channels_last: bool,
        backend: str,
    ) -> Tensor:
        modulated, norm = torch.ops.litevae.modulate_weight(
            weight, scale, gain, eps, dtype, channels_last, backend
        )
        ctx.save_for_backward(weight, scale, gain, norm)
        ctx.rest = (eps, dtype, channels_last, backend)
        return modulated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *inputs, norm = ctx.saved_tensors
        eps, dtype, channels_last, backend = ctx.rest
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A derivative of this derivative is needed: autograd of plain PyTorch has all orders.
            gradients = differentiable_gradients(
                lambda w, s, g: reference.modulate(w, s, g, eps, dtype, channels_last), inputs, needed, grad
            )
        else:
            computed = torch.ops.litevae.modulate_weight_backward(grad, *inputs, norm, eps, backend)
            gradients = [g if need else None for g, need in zip(computed, needed, strict=True)]
        return (*gradients, None, None, None, None)


def modulate_weight(
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    """Differentiable `litevae::modulate_weight`, without the norms."""
    arguments = (weight, scale, gain, eps, dtype, channels_last, backend)
    if in_inference_mode():
        return (_forward if is_plain(weight, scale, gain) else torch.ops.litevae.modulate_weight)(*arguments)[
            0
        ]
    return _ModulateWeight.apply(*arguments)
