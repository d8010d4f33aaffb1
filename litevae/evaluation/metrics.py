"""The metrics by name, and PSNR and SSIM of levels in 0..255: of single images, and of batches on any device."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from litevae.data.pixels import RGB, PixelFormat, Pixels
from litevae.errors import UserError
from litevae.losses.perceptual import LPIPS
from litevae.losses.st_lpips import LEAST_SIDE, STLPIPS

Metric = Literal["rfid", "lpips", "st_lpips", "psnr", "ssim"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DEFAULT_METRICS: tuple[Metric, ...] = ("rfid", "lpips", "psnr", "ssim")  # st_lpips needs another package
LOWER_IS_BETTER = ("rfid", "lpips", "st_lpips")
RGB_METRICS = ("rfid", "lpips", "st_lpips")  # whose networks take RGB images of 8 bits
SIGMA, RADIUS = 1.5, 5  # SSIM's window, in pixels


def check_metrics_apply(metrics: Sequence[str], pixel_format: PixelFormat, prefix: str = "") -> None:
    """Raises UserError, which begins with `prefix`, if a metric's network does not take such images."""
    _, others = split_metrics(metrics, pixel_format)
    if others:
        raise UserError(
            f"{prefix}{others[0]} compares RGB images of 8 bits, and the model's are {pixel_format}: choose from "
            "psnr, ssim"
        )


def check_metric_sizes(metrics: Sequence[str], sides: Sequence[int]) -> None:
    """Raises UserError if a metric does not take images with one of these sides, in pixels."""
    smallest = min(sides, default=LEAST_SIDE)
    if "st_lpips" in metrics and smallest < LEAST_SIDE:
        raise UserError(f"st_lpips needs images of at least {LEAST_SIDE} pixels a side, got {smallest}")


def distance_networks(metrics: Sequence[str]) -> nn.ModuleDict:
    """Returns the networks of the metrics that are the mean output of one, such as LPIPS, by the metrics' names.

    Raises:
        UserError: as the networks.
    """
    networks = {"lpips": LPIPS, "st_lpips": STLPIPS}
    return nn.ModuleDict({name: make() for name, make in networks.items() if name in metrics})


def split_metrics(metrics: Sequence[str], pixel_format: PixelFormat) -> tuple[list[str], list[str]]:
    """Returns the metrics that take images of a format, and those that do not."""
    left_out = [] if pixel_format == RGB else [name for name in metrics if name in RGB_METRICS]
    return [name for name in metrics if name not in left_out], left_out


def is_better(metric: Metric, value: float, other: float) -> bool:
    """Returns whether a value of a metric is better than another; NaN is never better."""
    return value < other if metric in LOWER_IS_BETTER else value > other


def find_best(metric: Metric, values: Sequence[float | None]) -> int | None:
    """Returns the index of the best value of a metric, the first of equal ones; None and NaN do not count."""
    best = None
    for index, value in enumerate(values):
        if value is None or math.isnan(value):
            continue
        other = None if best is None else values[best]
        if other is None or is_better(metric, value, other):
            best = index
    return best


def psnr(image: Pixels, reconstruction: Pixels) -> float:
    """Returns the peak signal-to-noise ratio in dB of two (H, W, C) images; infinite if they are equal."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(image, reconstruction, data_range=255))


def ssim(image: Pixels, reconstruction: Pixels) -> float:
    """Returns the structural similarity of two (H, W, C) images of at least 11 pixels, averaged over channels.

    The settings are those of Wang et al. (2004): an 11x11 Gaussian window of sigma 1.5, population covariance.
    """
    return float(
        structural_similarity(
            image,
            reconstruction,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
        )
    )


def batch_psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Returns the PSNR of each pair of images in two (N, C, H, W) tensors of levels: (N,) float64, in dB."""
    error = (images.double() - reconstructions.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def batch_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Returns the SSIM of each pair of images in two (N, C, H, W) tensors of levels, H and W at least 11: (N,) float64.

    torchmetrics' SSIM takes 121 taps per pixel where two passes need 22, and its float32 sums lose the variance
    of bright flat areas.
    """
    x, y = images.double(), reconstructions.double()
    mean_x, mean_y = window_mean(x), window_mean(y)
    variances = window_mean(x * x + y * y) - mean_x.square() - mean_y.square()
    covariance = window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def window_mean(x: Tensor) -> Tensor:
    """Returns the Gaussian-weighted mean of each 11x11 window: (..., H, W) to (..., H - 10, W - 10)."""
    weights = torch.exp(-0.5 * (torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (-1, -2):
        length = x.shape[axis] - 2 * RADIUS
        total = x.narrow(axis, 0, length) * weights[0].item()
        for offset, weight in enumerate(weights[1:].tolist(), 1):
            total.add_(x.narrow(axis, offset, length), alpha=weight)
        x = total
    return x
