"""Whole photographs through an autoencoder."""

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from litevae.data.images import Pixels, pad_image, to_pixels
from litevae.errors import UserError
from litevae.models.interface import Autoencoder, encode_pixels, spatial_compression


@torch.inference_mode()
def encode(model: Autoencoder, image: Pixels) -> Tensor:
    """The mode of the latent of an image.

    Args:
        model: of 3 channels; it runs on its own device and in its own dtype.
        image: (H, W, 3) uint8, of any size: padded by mirroring, see `pad_image`.

    Returns:
        (1, n_z, h, w) with h = max(⌈H/f⌉, 2) and w likewise, in the model's dtype and on its device.
    """
    return encode_pixels(model, pad_image(image, spatial_compression(model))).mode()


@torch.inference_mode()
def decode(model: Autoencoder, latent: Tensor, size: tuple[int, int]) -> Pixels:
    """The image of a latent that `encode` returned, (H, W, 3) uint8, with the padding cut off.

    Args:
        size: H and W of the image that was encoded.
    """
    decoded = to_pixels(model.decode(latent).sample)
    return decoded[0, :, : size[0], : size[1]].permute(1, 2, 0).contiguous().cpu().numpy()


def reconstruct(model: Autoencoder, image: Pixels) -> Pixels:
    """What is left of an (H, W, 3) uint8 image once it went through its latent; the same shape and type."""
    height, width = image.shape[:2]
    return decode(model, encode(model, image), (height, width))


def reconstruct_batch(model: Autoencoder, pixels: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) uint8 on the model's device, and as much of it as its latents keep.

    Args:
        seeds: of each image's sample; None decodes the mode.
    """
    pixels = pixels.to(model.device)
    posterior = encode_pixels(model, pixels)
    latent = posterior.mode() if seeds is None else sample_posterior(posterior, seeds)
    decoded: Tensor = model.decode(latent).sample
    if not decoded.isfinite().all():
        raise UserError("the model's reconstructions are not finite")
    return pixels, to_pixels(decoded)


def sample_posterior(posterior: DiagonalGaussianDistribution, seeds: Sequence[int]) -> Tensor:
    """A sample for each image from its own seed, drawn on the CPU: the same on any device and in any batch."""
    mean: Tensor = posterior.mean
    noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return mean + posterior.std * torch.stack(noise).to(mean)
