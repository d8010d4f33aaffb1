"""Checks of the tensors that a LiteVAE is called with."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.models.modeling_utils import get_parameter_device
from torch import Tensor, nn

from litevae.models.layers import first_tensor
from litevae_kernels.backend import is_tracing

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_image(x: Tensor, channels: int, factor: int) -> None:
    """Checks an image.

    It must have at least two latent pixels per side: in one, a GroupNorm of the encoder whose groups have one channel,
    as in LiteVAE-S, would see a single value per group and normalise it to zero, whatever the image shows.

    Raises:
        ValueError: the image is not (N, channels, H, W), or a side is not a multiple of `factor`, at least two of it.
        TypeError: it is no dense tensor, or has another dtype than those of `DTYPES`.
    """
    check_tensor("image", x, channels)
    if not x.is_floating_point():
        raise TypeError(
            f"image must be floating point in [-1, 1], got {x.dtype}; "
            "convert bytes with image.float() / 127.5 - 1"
        )
    check_dtype("image", x)
    height, width = x.shape[-2:]
    if height % factor or width % factor or height < 2 * factor or width < 2 * factor:
        raise ValueError(
            f"image height and width must be multiples of {factor}, at least {2 * factor}, got {height}x{width}; "
            f"nearest heights: {nearest_multiples(height, factor)}, widths: {nearest_multiples(width, factor)}"
        )


def check_latent(z: Tensor, channels: int) -> None:
    """Checks a latent.

    Raises:
        ValueError: the latent is not (N, channels, h, w), or has no pixels.
        TypeError: it is no dense tensor, or has another dtype than those of `DTYPES`.
    """
    check_tensor("latent", z, channels)
    check_dtype("latent", z)
    if 0 in z.shape[2:]:
        raise ValueError(f"latent height and width must be at least 1, got {z.shape[2]}x{z.shape[3]}")


def check_dtype(name: str, x: Tensor) -> None:
    """Raises TypeError unless `x` has a dtype of `DTYPES`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def check_tensor(name: str, x: Any, channels: int) -> None:
    """Raises TypeError unless `x` is a dense tensor, and ValueError unless it is (N, channels, H, W)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, (N, {channels}, H, W), got a {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be 4-D, (N, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]} in {tuple(x.shape)}")


def check_device(name: str, x: Tensor, model: nn.Module, part: nn.Module) -> None:
    """Raises ValueError unless `x` is on the device of `part`, which takes it, or the one that `model` will run on."""
    first = first_tensor(part)
    # accelerate's offloading loads weights on "meta" later
    if first is None or first.device == x.device or first.device.type == "meta":
        return
    device = get_parameter_device(model)  # this accounts for diffusers' group offloading
    if device != x.device:
        raise ValueError(f"{name} must be on the model's device {device}, got {x.device}")


def nearest_multiples(size: int, factor: int) -> str:
    """Returns the multiples of `factor` around `size` as text; the smallest is 2 factor."""
    around = size // factor * factor, math.ceil(size / factor) * factor
    return " and ".join(
        str(multiple) for multiple in sorted({max(multiple, 2 * factor) for multiple in around})
    )


def warn_of_two_scales(config: Mapping[str, Any]) -> None:
    """Warns if a model's configuration holds both of diffusers' normalisations, as `litevae scale` stored them once."""
    both = (config.get("latents_mean"), config.get("latents_std"))
    if None not in both and config.get("scaling_factor") != 1:
        warnings.warn(
            "config.json has scaling_factor and latents_mean with latents_std: SDXL pipelines apply both, others only "
            "the first; run `litevae scale` again, which stores scaling_factor alone",
            stacklevel=3,
        )


def without_tracer_warnings(function: Callable[P, T]) -> Callable[P, T]:
    """Returns `function` without the warnings of `torch.jit.trace` about Python's decisions on sizes.

    In the model and its operators, only checks and choices that are the same for all sizes depend on them.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_tracing():
            return function(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return call
