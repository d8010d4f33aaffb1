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
from litevae_kernels.tensors import (
    check_device,
    check_dtype,
    check_memory_format,
    check_tensor,
    device_type_of,
    is_channels_last,
    is_integer,
    refuse_tangents,
    shape_of,
    shown,
)

MAX_LEVELS = 16
LAST_AXES = (-2, -1)
# PyWavelets has these modes and old names as well, but none of these functions takes them.
OTHER_MODES = dict.fromkeys(("smooth", "periodization", "antisymmetric", "antireflect"), "") | {
    "sp1": " of 'smooth'",
    "per": " of 'periodization'",
    "sym": " of 'symmetric'",
    "zpd": " of 'zero'",
    "cpd": " of 'constant'",
    "ppd": " of 'periodic'",
}

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
    levels = _check_transform(image, levels, "levels", mode)
    if dtype is not None:
        check_dtype(dtype, "dtype is")
    check_memory_format(memory_format)
    return _analysis(image, levels, mode, 0.5, True, dtype, memory_format)


def wavedec2(
    image: Tensor, level: int | None = None, *, mode: str = "symmetric", axes: tuple[int, int] = LAST_AXES
) -> tuple[Tensor | Details, ...]:
    """Computes a multi-level orthonormal 2-D Haar decomposition in the layout of `pywt.wavedec2`.

    Args:
        image: two or more dimensions, any strides.
        level: number of levels, 1 to 16. Default: the largest for which each axis has at least two coefficients
            to transform, log2 of the shorter axis, rounded down (`pywt.dwtn_max_level`).
        mode: extension mode for odd sizes: symmetric, reflect, zero, periodic or constant.
        axes: the axes H and W that are transformed. cH holds the details along the first one, cV those along the
            second.

    Returns:
        ``(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))``, coarsest level first. The tensors of level l have
        the dimensions of `image`, with ceil(H/2^l) and ceil(W/2^l) for H and W.

    Raises:
        TypeError: `image` is not a floating-point tensor of a supported dtype, or `level` or `axes` are not
            integers.
        ValueError: fewer than 2 dimensions, empty height or width, level out of range (for None also if the image is
            one pixel high or wide), unknown mode, ``reflect`` on a length of 1, or axes that are equal or out of range.
    """
    check_tensor(image, "image")
    if image.ndim < 2:
        raise ValueError(f"image has {image.ndim} dimensions; at least 2 are needed: (..., height, width)")
    axes = _check_axes(axes, image)
    image = image.movedim(axes, (-2, -1)) if axes != LAST_AXES else image
    if level is None:
        level = _most_levels(image)
    flat = _as_4d(image)
    level = _check_transform(flat, level, "level", mode)
    coeffs: Sequence[Tensor] = _analysis(flat, level, mode, 1.0, False)
    if image.ndim != 4:
        coeffs = [c.reshape(*image.shape[:-2], *c.shape[-2:]) for c in coeffs]
    if axes != LAST_AXES:
        coeffs = [c.movedim((-2, -1), axes) for c in coeffs]
    return coeffs[0], *((coeffs[i], coeffs[i + 1], coeffs[i + 2]) for i in range(1, len(coeffs), 3))


def waverec2(
    coeffs: Sequence[Tensor | Sequence[Tensor]],
    *,
    axes: tuple[int, int] = LAST_AXES,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """Computes the inverse of `wavedec2`, from coefficients in the layout of `pywt.wavedec2`.

    Args:
        coeffs: ``(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))``, tensors of two or more dimensions.
        axes: the axes H and W that were transformed.
        output_size: size (H, W) of the image; each is twice the finest level's size, or one less. Default: twice,
            as in PyWavelets.

    Returns:
        The dimensions of the coefficients, with H and W of the image. It has the dtype and memory format of the
        coefficients.

    Raises:
        TypeError: the layout is not the one above (cA alone and details that are None, which PyWavelets takes as
            zeros, are not allowed), or dtypes differ or are not supported.
        ValueError: sizes that do not belong to one decomposition, tensors on several devices, or axes that are equal
            or out of range.
    """
    bands, axes = _check_coeffs(coeffs, axes)
    four = bands[0].ndim == 4
    flat = bands if four else [_as_4d(x) for x in bands]
    height, width = _check_output_size(output_size, *flat[-1].shape[2:])
    image = _synthesis(flat, height, width, False)
    if not four:
        image = image.reshape(*bands[0].shape[:-2], height, width)
    return image.movedim((-2, -1), axes) if axes != LAST_AXES else image


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
    backend = choose(device_type_of(image))
    if backend == "reference":
        return tuple(reference.analysis(image, levels, mode, scale, stacked, dtype, channels_last))
    refuse_tangents("the Haar transform", backend, image)
    return op.analysis(image, levels, mode, scale, stacked, dtype, channels_last, backend)


def _synthesis(coeffs: Sequence[Tensor], height: int, width: int, stacked: bool) -> Tensor:
    """Computes the inverse: with zero extension the adjoint crops (see `op`)."""
    first = coeffs[0]
    channels_last = is_channels_last(first)
    backend = choose(device_type_of(first))
    arguments = (coeffs, height, width, "zero", 1.0, stacked, first.dtype, channels_last)
    if backend == "reference":
        return reference.synthesis(*arguments)
    refuse_tangents("the Haar transform", backend, *coeffs)
    return op.synthesis(*arguments, backend)


def _check_image(x: object, name: str) -> None:
    check_tensor(x, name)
    assert isinstance(x, Tensor)
    if x.ndim != 4:
        raise ValueError(f"{name} has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name} has size {shape_of(x)}; height and width must be at least 1")


def _check_transform(image: Tensor, levels: int, name: str, mode: str) -> int:
    """Returns `levels` as Python's number."""
    if not isinstance(mode, str) or mode not in MODES:
        known = isinstance(mode, str) and mode in OTHER_MODES
        note = f", PyWavelets' name{OTHER_MODES[mode]}" if known else ""
        raise ValueError(f"mode is {shown(mode)}{note}; allowed: {', '.join(MODES)}")
    if not is_integer(levels):
        raise TypeError(f"{name} is {shown(levels)}; an integer from 1 to {MAX_LEVELS} is needed")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"{name} is {shown(levels)}; allowed: 1 to {MAX_LEVELS}")
    levels = int(levels)
    height, width = image.shape[2:]
    if height == 0 or width == 0:
        raise ValueError(f"image has height {height} and width {width}; both must be at least 1")
    if mode == "reflect":
        for i, (h, w) in enumerate(level_sizes(height, width, levels)[:-1]):
            if h == 1 or w == 1:
                raise ValueError(
                    f"mode 'reflect' needs a length of at least 2, but level {i + 1} transforms {h}x{w}; "
                    f"use another mode or fewer levels"
                )
    return levels


def _check_output_size(output_size: tuple[int, int] | None, h: int, w: int) -> tuple[int, int]:
    if output_size is None:
        return 2 * h, 2 * w
    pair = isinstance(output_size, Sequence) and len(output_size) == 2
    if not pair or not all(is_integer(size) for size in output_size):
        kind = TypeError if pair else ValueError
        raise kind(f"output_size is {shown(output_size)}; two whole numbers are needed: (height, width)")
    height, width = output_size
    if height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
        raise ValueError(
            f"output_size is {shown(tuple(output_size))}; coefficients of {h}x{w} belong to a height of {2 * h - 1} or "
            f"{2 * h} and a width of {2 * w - 1} or {2 * w}"
        )
    return height, width


def _as_4d(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if x.ndim > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.ndim)]


def _check_axes(axes: object, x: Tensor) -> tuple[int, int]:
    """Returns `axes`, counted from the end."""
    if axes is LAST_AXES:
        return LAST_AXES
    kind: type[Exception] = TypeError
    if isinstance(axes, Sequence) and all(is_integer(axis) for axis in axes):
        if len(axes) == 2 and all(-x.ndim <= axis < x.ndim for axis in axes):
            first, second = (axis - x.ndim if axis >= 0 else axis for axis in axes)
            if first != second:
                return first, second
        kind = ValueError
    raise kind(f"axes is {shown(axes)}; two different axes from {-x.ndim} to {x.ndim - 1} are needed")


def _most_levels(image: Tensor) -> int:
    """Returns the number of levels that PyWavelets calls the maximum for the last two axes."""
    shorter = min(image.shape[-2:])
    levels = int(shorter).bit_length() - 1
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"level is None, whose maximum is {max(levels, 0)} for {image.shape[-2]}x{image.shape[-1]}; allowed: 1 to "
            f"{MAX_LEVELS}"
        )
    return levels


def _check_coeffs(coeffs: object, axes: object) -> tuple[list[Tensor], tuple[int, int]]:
    """Returns cA and the details of each level, coarsest level first, with H and W last; and the axes of H and W."""
    layout = "(cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1))"
    if not isinstance(coeffs, Sequence) or len(coeffs) < 2:
        raise TypeError(f"coeffs must be {layout} with at least one level of details")
    approximation, *details = coeffs
    check_tensor(approximation, "cA")
    assert isinstance(approximation, Tensor)
    if approximation.ndim < 2:
        raise ValueError(f"cA has shape {shape_of(approximation)}; (..., height, width) is needed")
    axes = _check_axes(axes, approximation)

    moved = axes != LAST_AXES
    first = approximation.movedim(axes, (-2, -1)) if moved else approximation
    *outer, h, w = first.shape
    if h == 0 or w == 0:
        raise ValueError(f"cA has shape {shape_of(approximation)}; height and width of at least 1 are needed")
    if len(details) > MAX_LEVELS:
        raise ValueError(f"coeffs has {len(details)} levels; allowed: 1 to {MAX_LEVELS}")
    flat = [first]
    dtype, dims = approximation.dtype, approximation.ndim
    for i, bands in enumerate(details):
        level = len(details) - i
        if not isinstance(bands, Sequence) or len(bands) != 3:
            raise TypeError(
                f"the details of level {level} must be three tensors (cH, cV, cD); coeffs is {layout}"
            )
        for name, band in zip(("cH", "cV", "cD"), bands, strict=True):
            what = f"{name} of level {level}"
            check_tensor(band, what)
            if band.dtype != dtype:
                raise TypeError(f"{what} has dtype {band.dtype}; allowed: cA's, {dtype}")
            check_device(band, what, approximation, "cA")
            plane = band.movedim(axes, (-2, -1)) if moved and band.ndim == dims else band
            # All but the sizes of cH must be as in cA, and all of cV and cD as in cH.
            shape = plane.shape
            if name == "cH":
                size = shape[-2:]
                expected = (*outer, *size)
            if shape != expected:
                raise ValueError(
                    f"{what} has shape {shape_of(band)}, which does not belong with cA's "
                    f"{shape_of(approximation)} and cH's {shape_of(bands[0])}"
                )
            flat.append(plane)
        # The inverse of the coarser level is 2h x 2w, or one less where the size was odd.
        fits = size == (h, w) if i == 0 else size[0] in (2 * h, 2 * h - 1) and size[1] in (2 * w, 2 * w - 1)
        if not fits:
            raise ValueError(
                f"details of level {level} are {size[0]}x{size[1]}, which does not fit the {h}x{w} of "
                f"{'cA' if i == 0 else f'level {level + 1}'}"
            )
        h, w = size
    return flat, axes
