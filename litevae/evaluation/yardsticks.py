"""Yardsticks: reconstructions without any learning, which a model must beat to earn its place."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae.data.pixels import Pixels, as_batch
from litevae.evaluation.metrics import psnr, ssim
from litevae.models.interface import Autoencoder, spatial_compression
from litevae_kernels import wavedec2, waverec2

MEAN_COLOUR, BLOCK_MEANS, HAAR = "mean_colour", "block_means", "haar"
YARDSTICKS = (MEAN_COLOUR, BLOCK_MEANS, HAAR)
BELOW = "below the Haar yardstick"

MIDDLE = 127.5  # value of pixels without any coefficient


def make_yardsticks(model: Autoencoder, pixels: Tensor) -> dict[str, Tensor]:
    """Returns each yardstick's reconstruction of a batch, in the order of `YARDSTICKS`.

    Args:
        model: autoencoder that gives f and n_z: the block size and how many numbers a block's latent has.
        pixels: images (N, C, H, W), levels in 0..255, of any size.

    Returns:
        Images of the same shape and dtype by name.
    """
    factor = spatial_compression(model)
    images = pixels.float()
    made = (
        mean_colour(images),
        block_means(images, factor),
        coarsest_haar(images, factor, haar_count(model) // pixels.shape[1]),
    )
    return {
        name: (image.round() if pixels.dtype == torch.uint8 else image).clamp(0, 255).to(pixels.dtype)
        for name, image in zip(YARDSTICKS, made, strict=True)
    }


def mean_colour(images: Tensor) -> Tensor:
    """Returns images (N, C, H, W) with each channel replaced by its mean."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def block_means(images: Tensor, factor: int) -> Tensor:
    """Returns the means of `factor` x `factor` blocks of images (N, C, H, W), enlarged bicubically.

    Blocks at the lower and right border average the pixels that exist.
    """
    means = F.avg_pool2d(images, factor, ceil_mode=True)
    enlarged = F.interpolate(means, scale_factor=float(factor), mode="bicubic")
    return enlarged[..., : images.shape[2], : images.shape[3]]


def coarsest_haar(images: Tensor, factor: int, count: int) -> Tensor:
    """Returns what `count` Haar coefficients per channel and block of `factor` x `factor` pixels reconstruct.

    The kept coefficients are the first in the order of `pywt.wavedec2`, coarsest level first: the mean, the three
    details of the coarsest level, then those of the next level, by sub-band (horizontal, vertical, diagonal) and
    within a sub-band from the upper left to the lower right. Odd sizes are extended symmetrically.

    Args:
        images: images (N, C, H, W), float32 in [0, 255].
        factor: side of a block in pixels, a power of 2.
        count: number of coefficients per channel and block; 0 gives a uniform grey.
    """
    levels = factor.bit_length() - 1
    coefficients = wavedec2(images - MIDDLE, levels)
    average, details = cast(Tensor, coefficients[0]), coefficients[1:]
    kept: list[Tensor | tuple[Tensor, ...]] = [average if count else torch.zeros_like(average)]
    left = count - 1
    for bands in details:
        side = 2 ** (len(kept) - 1)  # side of the part of a sub-band that belongs to one block
        kept.append(tuple(keep_first(band, side, left - i * side**2) for i, band in enumerate(bands)))
        left -= 3 * side**2
    return waverec2(kept, output_size=(images.shape[2], images.shape[3])) + MIDDLE


def keep_first(band: Tensor, side: int, count: int) -> Tensor:
    """Returns a sub-band (..., h, w) with the first `count` coefficients of each `side` x `side` part, row by row."""
    if count >= side**2:
        return band
    rows, columns = (torch.arange(length, device=band.device) % side for length in band.shape[-2:])
    return torch.where(rows[:, None] * side + columns < count, band, 0)


def haar_count(model: Autoencoder) -> int:
    """Returns the number of Haar coefficients per block: the largest multiple of the channels that n_z holds."""
    channels = int(model.config.in_channels)
    limit = channels * spatial_compression(model) ** 2  # all coefficients of a block
    return min(int(model.config.latent_channels) // channels * channels, limit)


def yardstick_labels(model: Autoencoder) -> dict[str, str]:
    """Returns what each yardstick is called in tables and pictures."""
    block = "{0}x{0} block".format(spatial_compression(model))
    return {
        MEAN_COLOUR: "mean colour",
        BLOCK_MEANS: f"{block} means, enlarged",
        HAAR: f"{haar_count(model)} Haar coefficients per {block}",
    }


def reconstruct_without_learning(model: Autoencoder, image: Pixels) -> dict[str, Pixels]:
    """Returns each yardstick's reconstruction of one (H, W, C) image, in the same shape and dtype."""
    made = make_yardsticks(model, as_batch(image.copy()))
    return {name: each[0].permute(1, 2, 0).contiguous().numpy() for name, each in made.items()}


def measure_yardsticks(model: Autoencoder, images: Sequence[Pixels]) -> dict[str, dict[str, float]]:
    """Returns the mean PSNR and SSIM of each yardstick over (H, W, C) images of at least 11 pixels."""
    made = [reconstruct_without_learning(model, image) for image in images]
    return {
        name: {
            metric: sum(measure(image, each[name]) for image, each in zip(images, made, strict=True))
            / len(images)
            for metric, measure in (("psnr", psnr), ("ssim", ssim))
        }
        for name in YARDSTICKS
    }


def for_json(yardsticks: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Returns the values of yardsticks with None for an infinite PSNR, which JSON does not have."""
    return {
        name: {metric: value if math.isfinite(value) else None for metric, value in values.items()}
        for name, values in yardsticks.items()
    }


def below_haar(values: Mapping[str, float], yardsticks: Mapping[str, Mapping[str, float]]) -> bool:
    """Returns whether a model's PSNR is below that of the Haar yardstick; False if PSNR was not measured."""
    return "psnr" in values and values["psnr"] < yardsticks[HAAR]["psnr"]
