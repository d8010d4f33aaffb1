"""Reconstructions by an autoencoder: of whole photographs, and of batches of squares."""

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from litevae.data.pixels import Pixels, pad_image, to_pixels
from litevae.errors import UserError
from litevae.models.interface import Autoencoder, encode_pixels, pixel_format, spatial_compression


@torch.inference_mode()
def encode(model: Autoencoder, image: Pixels) -> Tensor:
    """Encodes an image to the mode of its posterior.

    Args:
        model: autoencoder; it runs on its own device and in its own dtype.
        image: (H, W, C) pixels of any size in the model's format; `pad_image` pads them by mirroring.

    Returns:
        The latent (1, n_z, h, w) with h = max(⌈H/f⌉, 2) and w likewise, in the model's dtype and on its device.
    """
    return encode_pixels(model, pad_image(image, spatial_compression(model))).mode()


@torch.inference_mode()
def decode(model: Autoencoder, latent: Tensor, size: tuple[int, int]) -> Pixels:
    """Decodes a latent to (H, W, C) pixels in the model's format, without the padding.

    Args:
        model: autoencoder that encoded the image.
        latent: result of `encode`.
        size: height and width of the image that was encoded.
    """
    decoded = to_pixels(model.decode(latent).sample, pixel_format(model).dtype)
    return decoded[0, :, : size[0], : size[1]].permute(1, 2, 0).contiguous().cpu().numpy()


def reconstruct(model: Autoencoder, image: Pixels) -> Pixels:
    """Encodes and decodes an (H, W, C) image; returns the same shape and dtype."""
    height, width = image.shape[:2]
    return decode(model, encode(model, image), (height, width))


def reconstruct_batch(model: Autoencoder, pixels: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """Returns a batch and its reconstruction, both (N, C, H, W) on the model's device.

    Args:
        model: autoencoder.
        pixels: (N, C, H, W) pixels in the model's format, which the reconstruction has too.
        seeds: seed of each image's sample of the posterior; None decodes the mode.

    Raises:
        UserError: the model does not take this size, or its reconstructions are not finite.
    """
    pixels = pixels.to(model.device)
    posterior = encode_pixels(model, pixels)
    latent = posterior.mode() if seeds is None else sample_posterior(posterior, seeds)
    decoded: Tensor = model.decode(latent).sample
    if not decoded.isfinite().all():
        raise UserError("the model's reconstructions are not finite")
    return pixels, to_pixels(decoded, pixels.dtype)


def sample_posterior(posterior: DiagonalGaussianDistribution, seeds: Sequence[int]) -> Tensor:
    """Samples each image's posterior from its own seed.

    The noise is drawn on the CPU, so that a sample is the same on every device and in every batch.
    """
    mean: Tensor = posterior.mean
    noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return mean + posterior.std * torch.stack(noise).to(mean)
