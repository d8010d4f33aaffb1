"""Two-dimensional Haar wavelet transforms.

For the pixels ``a b / c d`` of a 2x2 block the orthonormal coefficients are LL=(a+b+c+d)/2, H=(a+b-c-d)/2,
V=(a-b+c-d)/2 and D=(a-b-c+d)/2, as PyWavelets' ``(cA, (cH, cV, cD))`` of wavelet ``haar``. An axis of odd length
n gives ceil(n/2) coefficients. The extension mode supplies the missing last sample at every level: ``symmetric``
and ``constant`` repeat the last sample, ``reflect`` takes the one before it, ``periodic`` takes the first, and
``zero`` takes a zero.

All functions accept float64, float32, bfloat16 and float16, compute in float32 (float64 for float64), keep the
input's memory format (contiguous or channels_last), are differentiable any number of times, and run on the backends
of `litevae_kernels.use_backend`. Under the transforms of `torch.func` it is the reference. Forward-mode derivatives
outside of them need ``use_backend("reference")``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import choose
from litevae_kernels.haar import op, reference
from litevae_kernels.haar.shapes import MODES, level_sizes
from litevae_kernels.tensors import check_dtype, check_memory_format, check_tensor, is_channels_last

MAX_LEVELS = 16

Details = tuple[Tensor, Tensor, Tensor]


def haar_dwt2d(image: Tensor, *, mode: str = "symmetric") -> Tensor:
    """Computes one level of the orthonormal 2-D Haar transform.

    Args:
        image: (N, C, H, W), any strides.
        mode: extension mode for odd sizes: symmetric, reflect, zero, periodic or constant.

    Returns:
        (N, 4C, ceil(H/2), ceil(W/2)), sub-band-major: the C channels of LL, then those of H, V and D. The dtype
        and memory format are those of `image`.

    Raises:
        TypeError: `image` is not a floating-point tensor of a supported dtype.
        ValueError: wrong number of dimensions, empty height or width, unknown mode, or ``reflect`` on a length
            of 1.
    """
    _check_image(image, "image")
    _check_transform(image, 1, "levels", mode)
    return _analysis(image, 1, mode, 1.0, True)[0]


def haar_idwt2d(coeffs: Tensor, *, output_size: tuple[int, int] | None = None) -> Tensor:
    """Computes the inverse of `haar_dwt2d`.

    Args:
        coeffs: (N, 4C, h, w), sub-band-major LL, H, V, D, any strides.
        output_size: size (H, W) of the image: 2h or 2h-1, and 2w or 2w-1. An odd size crops the sample that the
            transform appended. Default: (2h, 2w).

    Returns:
        (N, C, H, W), with the dtype and memory format of `coeffs`.

    Raises:
        TypeError: `coeffs` is not a floating-point tensor of a supported dtype.
        ValueError: wrong number of dimensions, channels not a multiple of 4, or an `output_size` that does not
            match the size of the coefficients.
    """
    _check_image(coeffs, "coeffs")
    if coeffs.shape[1] % 4 != 0:
        raise ValueError(f"coeffs has {coeffs.shape[1]} channels; a multiple of 4 is needed (LL, H, V, D)")
    height, width = _check_output_size(output_size, coeffs.shape[2], coeffs.shape[3])
    return _synthesis([coeffs], height, width, True)


def haar_pyramid(
    image: Tensor,
    levels: int = 3,
    *,
    mode: str = "symmetric",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, ...]:
    """Computes all levels of LiteVAE's input in one pass over the image (paper Section 4.1 and Appendix G).

    Level l is the transform of level l-1's LL, scaled by 2^-l in total, so that LL is the mean of the 2^l x 2^l
    pixels under it and stays in the range of the image.

    Args:
        image: (N, C, H, W), any strides.
        levels: number of levels, 1 to 16.
        mode: extension mode for odd sizes: symmetric, reflect, zero, periodic or constant.
        dtype: dtype of the outputs; default: the image's. Results are rounded once, when they are stored.
        memory_format: memory format of the outputs, `torch.contiguous_format` or `torch.channels_last`; default:
            the image's.

    Returns:
        One tensor per level, finest first: (N, 4C, ceil(H/2^l), ceil(W/2^l)), sub-band-major LL, H, V, D.

    Raises:
        TypeError: `image` or `dtype` is not float32, float64, float16 or bfloat16.
        ValueError: wrong number of dimensions, empty height or width, levels out of range, unknown mode or
            memory format, or ``reflect`` on a length of 1.
    """
    _check_image(image, "image")
    _check_transform(image, levels, "levels", mode)
    if dtype is not None:
        check_dtype(dtype, "dtype is")
    check_memory_format(memory_format)
    return _analysis(image, levels, mode, 0.5, True, dtype, memory_format)


def wavedec2(image: Tensor, level: int, *, mode: str = "symmetric") -> tuple[Tensor | Details, ...]:
    """Computes a multi-level orthonormal 2-D Haar decomposition in the layout of `pywt.wavedec2`.

    Args:
        image: (..., H, W), any leading dimensions, any strides.
        level: number of levels, 1 to 16.
        mode: extension mode for odd sizes: symmetric, reflect, zero, periodic or constant.

    Returns:
        ``(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))``, coarsest level first. The tensors of level l are
        (..., ceil(H/2^l), ceil(W/2^l)).

    Raises:
        TypeError: `image` is not a floating-point tensor of a supported dtype.
        ValueError: fewer than 2 dimensions, empty height or width, level out of range, unknown mode, or
            ``reflect`` on a length of 1.
    """
    check_tensor(image, "image")
    if image.ndim < 2:
        raise ValueError(f"image has {image.ndim} dimensions; at least 2 are needed: (..., height, width)")
    flat = _as_4d(image)
    _check_transform(flat, level, "level", mode)
    coeffs = [c.reshape(*image.shape[:-2], *c.shape[-2:]) for c in _analysis(flat, level, mode, 1.0, False)]
    return coeffs[0], *((coeffs[i], coeffs[i + 1], coeffs[i + 2]) for i in range(1, len(coeffs), 3))


def waverec2(
    coeffs: Sequence[Tensor | Sequence[Tensor]], *, output_size: tuple[int, int] | None = None
) -> Tensor:
    """Computes the inverse of `wavedec2`, from coefficients in the layout of `pywt.wavedec2`.

    Args:
        coeffs: ``(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))``, each a tensor (..., h, w).
        output_size: size (H, W) of the image; each is twice the finest level's size, or one less. Default: twice,
            as in PyWavelets.

    Returns:
        (..., H, W), with the dtype and memory format of the coefficients.

    Raises:
        TypeError: the layout is not the one above (cA alone and details that are None, which PyWavelets takes as
            zeros, are not allowed), or dtypes or devices differ or are not supported.
        ValueError: sizes that do not belong to one decomposition.
    """
    flat, leading = _flatten_coeffs(coeffs)
    height, width = _check_output_size(output_size, flat[-1].shape[2], flat[-1].shape[3])
    image = _synthesis(flat, height, width, False)
    return image.reshape(*leading, height, width)


def _analysis(
    image: Tensor,
    levels: int,
    mode: str,
    scale: float,
    stacked: bool,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, ...]:
    dtype = image.dtype if dtype is None else dtype
    keep = is_channels_last(image)
    channels_last = keep if memory_format is None else memory_format == torch.channels_last
    backend = choose(image.device.type)
    if backend == "reference":
        return tuple(reference.analysis(image, levels, mode, scale, stacked, dtype, channels_last))
    return op.analysis(image, levels, mode, scale, stacked, dtype, channels_last, backend)


def _synthesis(coeffs: Sequence[Tensor], height: int, width: int, stacked: bool) -> Tensor:
    """Computes the inverse: with zero extension the adjoint crops (see `op`)."""
    first = coeffs[0]
    channels_last = is_channels_last(first)
    backend = choose(first.device.type)
    arguments = (coeffs, height, width, "zero", 1.0, stacked, first.dtype, channels_last)
    if backend == "reference":
        return reference.synthesis(*arguments)
    return op.synthesis(*arguments, backend)


def _check_image(x: object, name: str) -> None:
    check_tensor(x, name)
    assert isinstance(x, Tensor)
    if x.ndim != 4:
        raise ValueError(f"{name} has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} has size {tuple(x.shape)}; height and width must be at least 1")


def _check_transform(image: Tensor, levels: int, name: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"{name} is {levels!r}; an integer from 1 to {MAX_LEVELS} is needed")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"{name} is {levels}; allowed: 1 to {MAX_LEVELS}")
    height, width = image.shape[2], image.shape[3]
    if height == 0 or width == 0:
        raise ValueError(f"image has height {height} and width {width}; both must be at least 1")
    if mode == "reflect":
        for i, (h, w) in enumerate(level_sizes(height, width, levels)[:-1]):
            if h == 1 or w == 1:
                raise ValueError(
                    f"mode 'reflect' needs a length of at least 2, but level {i + 1} transforms {h}x{w}; "
                    f"use another mode or fewer levels"
                )


def _check_output_size(output_size: tuple[int, int] | None, h: int, w: int) -> tuple[int, int]:
    if output_size is None:
        return 2 * h, 2 * w
    if not isinstance(output_size, Sequence) or len(output_size) != 2:
        raise ValueError(f"output_size is {output_size!r}; two whole numbers are needed: (height, width)")
    if any(isinstance(size, (float, complex, str, Tensor)) for size in output_size):  # SymInt is allowed
        raise TypeError(f"output_size is {output_size!r}; two whole numbers are needed: (height, width)")
    height, width = output_size
    if height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
        raise ValueError(
            f"output_size is ({height}, {width}); coefficients of {h}x{w} belong to a height of {2 * h - 1} or "
            f"{2 * h} and a width of {2 * w - 1} or {2 * w}"
        )
    return height, width


def _as_4d(x: Tensor) -> Tensor:
    if x.ndim > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.ndim)]


def _flatten_coeffs(coeffs: Sequence[Tensor | Sequence[Tensor]]) -> tuple[list[Tensor], torch.Size]:
    layout = "(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))"
    if not isinstance(coeffs, Sequence) or len(coeffs) < 2:
        raise TypeError(f"coeffs must be {layout} with at least one level of details")
    approximation, *details = coeffs
    check_tensor(approximation, "cA")
    assert isinstance(approximation, Tensor)
    if approximation.ndim < 2 or 0 in approximation.shape[-2:]:
        raise ValueError(
            f"cA has shape {tuple(approximation.shape)}; (..., height, width) of at least 1 is needed"
        )
    if len(details) > MAX_LEVELS:
        raise ValueError(f"coeffs has {len(details)} levels; allowed: 1 to {MAX_LEVELS}")
    flat = [approximation]
    h, w = approximation.shape[-2:]
    for i, bands in enumerate(details):
        level = len(details) - i
        if not isinstance(bands, Sequence) or len(bands) != 3:
            raise TypeError(
                f"the details of level {level} must be three tensors (cH, cV, cD); coeffs is {layout}"
            )
        # The inverse of the coarser level is 2h x 2w, or one less where the size was odd.
        size = bands[0].shape[-2:] if isinstance(bands[0], Tensor) else ()
        for name, band in zip(("cH", "cV", "cD"), bands, strict=True):
            check_tensor(band, f"{name} of level {level}")
            if band.dtype != approximation.dtype or band.device != approximation.device:
                raise TypeError(
                    f"{name} of level {level} is {band.dtype} on {band.device}, cA is {approximation.dtype} on "
                    f"{approximation.device}; all must agree"
                )
            if band.shape[:-2] != approximation.shape[:-2] or band.shape[-2:] != size:
                raise ValueError(
                    f"{name} of level {level} has shape {tuple(band.shape)}, which does not belong with cA's "
                    f"{tuple(approximation.shape)} and cH's {tuple(bands[0].shape)}"
                )
            flat.append(band)
        fits = size == (h, w) if i == 0 else size[0] in (2 * h, 2 * h - 1) and size[1] in (2 * w, 2 * w - 1)
        if not fits:
            raise ValueError(
                f"details of level {level} are {size[0]}x{size[1]}, which does not fit the {h}x{w} of "
                f"{'cA' if i == 0 else f'level {level + 1}'}"
            )
        h, w = size
    return [_as_4d(x) for x in flat], approximation.shape[:-2]
