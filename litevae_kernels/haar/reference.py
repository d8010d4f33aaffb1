"""The Haar transform in plain PyTorch: the oracle, and the fallback.

Differentiable by autograd as it stands, so it is also the oracle for every other backend's backward pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype, to_format

# The order is the core's enum.
MODES = ("symmetric", "reflect", "zero", "periodic", "constant")


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """(height, width) of the image and of each level's sub-bands, finest first."""
    sizes = [(height, width)]
    for _ in range(levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def stand_in(n: int, mode: str) -> int:
    """Index of the sample that stands for the missing one behind an axis of odd length `n`; not for "zero"."""
    return {"symmetric": n - 1, "constant": n - 1, "reflect": n - 2, "periodic": 0}[mode]


def _extend(x: Tensor, dim: int, mode: str) -> Tensor:
    n = x.shape[dim]
    if n % 2 == 0:
        return x
    missing = x.narrow(dim, 0 if mode == "zero" else stand_in(n, mode), 1)
    if mode == "zero":
        missing = torch.zeros_like(missing)
    return torch.cat([x, missing], dim)


def _fold(x: Tensor, dim: int, n: int, mode: str) -> Tensor:
    """Adjoint of `_extend`: crops `x` to length `n` and adds the missing sample where it came from."""
    if n % 2 == 0:
        return x
    kept, missing = x.narrow(dim, 0, n), x.narrow(dim, n, 1)
    if mode == "zero":
        return kept
    to = stand_in(n, mode)
    padding = [to, n - 1 - to] if dim == 3 else [0, 0, to, n - 1 - to]
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
    """Image (N, C, H, W) to coefficients; see `litevae_kernels.haar.op` for their layout."""
    ll = image.to(accumulate_dtype(image.dtype, dtype))
    out: list[Tensor] = []
    for level in range(1, levels + 1):
        x = _extend(_extend(ll, 2, mode), 3, mode)
        a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
        c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        factor = 0.5 * scale
        ll = (a + b + c + d) * factor
        details = [(a + b - c - d) * factor, (a - b + c - d) * factor, (a - b - c + d) * factor]
        if stacked:
            out.append(torch.cat([ll, *details], 1))
        else:
            out = [*([ll] if level == levels else []), *details, *out]
    return [to_format(x, dtype, channels_last) for x in out]


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
    """The adjoint of `analysis`: coefficients to an image (N, C, `height`, `width`)."""
    accumulate = accumulate_dtype(dtype, coeffs[0].dtype)
    levels = len(coeffs) if stacked else (len(coeffs) - 1) // 3
    sizes = level_sizes(height, width, levels)
    x: Tensor | None = None
    for level in range(levels, 0, -1):
        if stacked:
            ll, h, v, d = coeffs[level - 1].to(accumulate).chunk(4, 1)
        else:
            first = 1 + 3 * (levels - level)
            h, v, d = (band.to(accumulate) for band in coeffs[first : first + 3])
            ll = coeffs[0].to(accumulate) if level == levels else torch.zeros_like(h)
        if x is not None:
            ll = ll + x
        factor = 0.5 * scale
        top = torch.stack([ll + h + v + d, ll + h - v - d], -1).flatten(-2)
        bottom = torch.stack([ll - h + v - d, ll - h - v + d], -1).flatten(-2)
        x = torch.stack([top, bottom], -2).flatten(-3, -2) * factor
        x = _fold(_fold(x, 3, sizes[level - 1][1], mode), 2, sizes[level - 1][0], mode)
    assert x is not None
    return to_format(x, dtype, channels_last)
