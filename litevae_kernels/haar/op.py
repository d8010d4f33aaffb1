"""Registration of the two Haar operators with PyTorch, and their derivatives.

Every public function is one of two linear maps: `analysis` (image to coefficients) and its adjoint `synthesis`. Each
is the backward pass of the other, to any order. The inverse transform is the adjoint of the transform with zero
extension: the inverse crops the sample that the extension appended.

Coefficients are either ``stacked`` or flat. Stacked, there is one tensor (N, 4C, h, w) per level, finest level first,
with the channels of LL, H, V and D in this order. Flat, the order is that of PyWavelets: LL of the coarsest level, then
H, V and D of each level, coarsest level first, each (N, C, h, w). Level l is multiplied by ``scale**l``; a scale of 1
makes the transform orthonormal.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from litevae_kernels.haar import native
from litevae_kernels.haar.shapes import level_sizes
from litevae_kernels.tensors import empty_4d, in_inference_mode, is_channels_last, is_plain


def _backend(name: str) -> ModuleType:
    if name == "triton":
        from litevae_kernels.haar import triton  # Triton is not available on every platform.

        return triton
    return native


def _empty_coeffs(
    image: Tensor, levels: int, stacked: bool, dtype: torch.dtype, channels_last: bool
) -> list[Tensor]:
    n, c, height, width = image.shape
    sizes = level_sizes(height, width, levels)[1:]
    if stacked:
        shapes = [(n, 4 * c, *size) for size in sizes]
    else:
        shapes = [(n, c, *sizes[-1])] + [(n, c, *size) for size in reversed(sizes) for _ in range(3)]
    device = image.device
    return [empty_4d(shape, dtype, device, channels_last) for shape in shapes]


def _empty_image(
    coeffs: Sequence[Tensor], height: int, width: int, stacked: bool, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    n, c = coeffs[0].shape[:2]
    shape = (n, c // 4 if stacked else c, height, width)
    return empty_4d(shape, dtype, coeffs[0].device, channels_last)


torch.library.define(
    "litevae::haar_analysis",
    "(Tensor image, int levels, str mode, float scale, bool stacked, ScalarType dtype, bool channels_last, "
    "str backend) -> Tensor[]",
)
torch.library.define(
    "litevae::haar_synthesis",
    "(Tensor[] coeffs, SymInt height, SymInt width, str mode, float scale, bool stacked, ScalarType dtype, "
    "bool channels_last, str backend) -> Tensor",
)


def _analysis(
    image: Tensor,
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    coeffs = _empty_coeffs(image, levels, stacked, dtype, channels_last)
    _backend(backend).analysis(image, coeffs, levels, mode, scale, stacked)
    return coeffs


def _synthesis(
    coeffs: Sequence[Tensor],
    height: int,
    width: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    image = _empty_image(coeffs, height, width, stacked, dtype, channels_last)
    levels = len(coeffs) if stacked else (len(coeffs) - 1) // 3
    _backend(backend).synthesis(image, coeffs, levels, mode, scale, stacked)
    return image


for _key in ("CPU", "CUDA"):
    torch.library.impl("litevae::haar_analysis", _key, _analysis)
    torch.library.impl("litevae::haar_synthesis", _key, _synthesis)


@torch.library.register_fake("litevae::haar_analysis")
def _(
    image: Tensor,
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> list[Tensor]:
    return _empty_coeffs(image, levels, stacked, dtype, channels_last)


@torch.library.register_fake("litevae::haar_synthesis")
def _(
    coeffs: Sequence[Tensor],
    height: int,
    width: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    return _empty_image(coeffs, height, width, stacked, dtype, channels_last)


class _Analysis(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        levels: int,
        mode: str,
        scale: float,
        stacked: bool,
        dtype: torch.dtype,
        channels_last: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.size = image.shape[2:]
        ctx.rest = (mode, scale, stacked, image.dtype, is_channels_last(image), backend)
        return tuple(
            torch.ops.litevae.haar_analysis(
                image, levels, mode, scale, stacked, dtype, channels_last, backend
            )
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (_Synthesis.apply(*ctx.size, *ctx.rest, *grads), *[None] * 7)


class _Synthesis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # The signature is one catch-all because the compiler of torch 2.11 miscounts named arguments before
        # *coeffs and then drops ctx.
        height, width, mode, scale, stacked, dtype, channels_last, backend, *coeffs = arguments
        ctx.levels = len(coeffs) if stacked else (len(coeffs) - 1) // 3
        ctx.rest = (mode, scale, stacked, coeffs[0].dtype, is_channels_last(coeffs[0]), backend)
        return torch.ops.litevae.haar_synthesis(
            coeffs, height, width, mode, scale, stacked, dtype, channels_last, backend
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*[None] * 8, *_Analysis.apply(grad, ctx.levels, *ctx.rest))


def analysis(
    image: Tensor,
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Differentiable `litevae::haar_analysis`."""
    arguments = (image, levels, mode, scale, stacked, dtype, channels_last, backend)
    if in_inference_mode():
        return tuple((_analysis if is_plain(image) else torch.ops.litevae.haar_analysis)(*arguments))
    return _Analysis.apply(*arguments)


def synthesis(
    coeffs: Sequence[Tensor],
    height: int,
    width: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    """Differentiable `litevae::haar_synthesis`."""
    arguments = (height, width, mode, scale, stacked, dtype, channels_last, backend)
    if in_inference_mode():
        return (_synthesis if is_plain(*coeffs) else torch.ops.litevae.haar_synthesis)(coeffs, *arguments)
    return _Synthesis.apply(*arguments, *coeffs)
