"""The Haar transform in plain PyTorch: the oracle, and the fallback.

Autograd differentiates it as it stands, so it is also the oracle for every other backend's backward pass. It shares
no arithmetic of shapes with them: an error in `litevae_kernels.haar.shapes` must show in the tests.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype, to_format


def _repeated_sample(n: int, mode: str) -> int | None:
    """Returns the index of the sample that is repeated after an axis of odd length `n`; None means a zero."""
    if mode == "zero":
        return None
    if mode == "periodic":
        return 0
    return n - 2 if mode == "reflect" else n - 1


def _extend(x: Tensor, dim: int, mode: str) -> Tensor:
    """Appends the missing sample to an axis of odd length."""
    n = x.shape[dim]
    if n % 2 == 0:
        return x
    index = _repeated_sample(n, mode)
    missing = torch.zeros_like(x.narrow(dim, 0, 1)) if index is None else x.narrow(dim, index, 1)
    return torch.cat([x, missing], dim)


def _fold(x: Tensor, dim: int, n: int, mode: str) -> Tensor:
    """Adjoint of `_extend`: crops `x` to length `n` and adds the missing sample to the one that it repeats."""
    if n % 2 == 0:
        return x
    kept, missing = x.narrow(dim, 0, n), x.narrow(dim, n, 1)
    index = _repeated_sample(n, mode)
    if index is None:
        return kept
    padding = [index, n - 1 - index] if dim == 3 else [0, 0, index, n - 1 - index]
    return kept + F.pad(missing, padding)


def analysis(
    image: Tensor,
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> list[Tensor]:
    """Transforms an image (N, C, H, W); `litevae_kernels.haar.op` describes the layout of the coefficients."""
    ll = image.to(accumulate_dtype(image.dtype, dtype))
    coeffs: list[Tensor] = []
    for level in range(1, levels + 1):
        extended = _extend(_extend(ll, 2, mode), 3, mode)
        a, b = extended[..., 0::2, 0::2], extended[..., 0::2, 1::2]
        c, d = extended[..., 1::2, 0::2], extended[..., 1::2, 1::2]
        factor = 0.5 * scale
        ll = (a + b + c + d) * factor
        details = [(a + b - c - d) * factor, (a - b + c - d) * factor, (a - b - c + d) * factor]
        if stacked:
            coeffs.append(torch.cat([ll, *details], 1))
        else:
            coeffs = [*([ll] if level == levels else []), *details, *coeffs]
    return [to_format(x, dtype, channels_last) for x in coeffs]


def synthesis(
    coeffs: Sequence[Tensor],
    height: int,
    width: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Adjoint of `analysis`: transforms coefficients to an image (N, C, `height`, `width`)."""
    accumulate = accumulate_dtype(dtype, coeffs[0].dtype)
    levels = len(coeffs) if stacked else (len(coeffs) - 1) // 3
    image: Tensor | None = None
    for level in range(levels, 0, -1):
        details = 1 + 3 * (levels - level)  # index of the level's H if the coefficients are flat
        if stacked:
            ll, h, v, d = coeffs[level - 1].to(accumulate).chunk(4, 1)
        else:
            h, v, d = (band.to(accumulate) for band in coeffs[details : details + 3])
            ll = coeffs[0].to(accumulate) if level == levels else torch.zeros_like(h)
        if image is not None:
            ll = ll + image
        factor = 0.5 * scale
        top = torch.stack([ll + h + v + d, ll + h - v - d], -1).flatten(-2)
        bottom = torch.stack([ll - h + v - d, ll - h - v + d], -1).flatten(-2)
        image = torch.stack([top, bottom], -2).flatten(-3, -2) * factor
        if level > 1:
            finer = coeffs[level - 2] if stacked else coeffs[details + 3]
            size = finer.shape[2:]
        else:
            size = torch.Size((height, width))
        image = _fold(_fold(image, 3, size[1], mode), 2, size[0], mode)
    assert image is not None
    return to_format(image, dtype, channels_last)
