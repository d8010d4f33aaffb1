"""The choice of what serves a 3x3 convolution on the CPU: the kernels or PyTorch's convolution."""

import torch

from litevae_kernels.arithmetic import multiplies
from litevae_kernels.backend import core, core_error

AMX = core is not None and core.has_amx_bf16()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# PyTorch's convolution is faster below these limits: the kernels pad the channels to whole vectors, and transform all
# weights whatever the size of the image. A limit is per image, not per batch, so that an image's result does not
# depend on the other images of the batch.
LEAST_CHANNELS = 3
# Pairs of channels and pixels: a layer with at least so many channels is served from so many pixels per image on.
LEAST_PIXELS = ((16, 64), (LEAST_CHANNELS, 256))
LEAST_CHANNELS_BFLOAT16 = 32  # of the kernels that multiply in bfloat16
LEAST_PIXELS_BFLOAT16 = 128
WIDEST_VECTOR = 16  # channels per vector, with AVX-512


def why_not(dtype: torch.dtype, isa: str | None) -> str | None:
    """Returns why the kernels serve no call of a dtype on the CPU; None if they serve some.

    Args:
        dtype: dtype of the result.
        isa: instruction set, as `current_isa` returns it.
    """
    if core is None:
        return f"the compiled core did not load ({core_error})"
    if dtype not in DTYPES:
        return "the kernels compute in float32"
    if dtype == torch.float32 or not multiplies(dtype, isa):
        return None
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16 or isa != "avx512bf16":
        return f"this CPU has {name} arithmetic, which only PyTorch's convolution uses"
    return "PyTorch's convolution is faster on this CPU, which has AMX" if AMX else None


def serves(dtype: torch.dtype, isa: str | None, channels_innermost: bool, channels: int, pixels: int) -> bool:
    """Returns whether the operator serves a call on the CPU.

    Inside the operator, PyTorch's convolution computes small images, so a compiled graph does not depend on the size of
    the images, except in bfloat16 on CPUs that multiply it.

    Args:
        dtype: dtype of the result.
        isa: instruction set, as `current_isa` returns it.
        channels_innermost: whether channels are adjacent in memory.
        channels: number of input channels or output channels, whichever is lower.
        pixels: number of pixels per image.
    """
    if why_not(dtype, isa) is not None:
        return False
    if multiplies_bfloat16(dtype, isa):
        least = LEAST_CHANNELS_BFLOAT16, LEAST_PIXELS_BFLOAT16
        return channels_innermost and channels >= least[0] and pixels >= least[1]
    return channels >= LEAST_CHANNELS


def multiplies_bfloat16(dtype: torch.dtype, isa: str | None) -> bool:
    """Returns whether the kernels that multiply in bfloat16 serve the calls of a dtype."""
    return dtype == torch.bfloat16 and multiplies(dtype, isa)


def is_small(dtype: torch.dtype, isa: str | None, channels: int, pixels: int) -> bool:
    """Returns whether the images of a call that `serves` accepts are too small for the float32 kernels."""
    if multiplies_bfloat16(dtype, isa):
        return False
    return not any(channels >= least and pixels >= limit for least, limit in LEAST_PIXELS)


def describe(dtype: torch.dtype, isa: str | None) -> str:
    """Returns what serves the calls of a dtype, if no backend is forced."""
    reason = why_not(dtype, isa)
    if reason is not None:
        return f"PyTorch's convolution   (not native: {reason})"
    if multiplies_bfloat16(dtype, isa):
        limits = f"{LEAST_CHANNELS_BFLOAT16} channels and {LEAST_PIXELS_BFLOAT16} pixels"
        return f"native if channels are innermost, from {limits}; else PyTorch's convolution"
    limits = " or ".join(f"{channels} channels and {pixels} pixels" for channels, pixels in LEAST_PIXELS)
    how = "native" if dtype == torch.float32 else "native in float32"
    return f"{how}, from {limits}; else PyTorch's convolution"
