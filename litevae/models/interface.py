"""What all autoencoders have in common, and one check of image sizes."""

from typing import TypeAlias

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from litevae.data.images import to_model_range
from litevae.errors import UserError
from litevae.models.autoencoder import LiteVAE

Autoencoder: TypeAlias = LiteVAE | AutoencoderKL

MIN_SIZE = 16  # pixels; VGG16 and SSIM's window need as many


def spatial_compression(model: Autoencoder) -> int:
    """f: pixels of the image for one of the latent, along a side."""
    return 2 ** (len(model.config.block_out_channels) - 1)


def only_size(model: Autoencoder) -> int | None:
    """Side of the only square images, or tiles, that the model encodes, where it does not take all sizes."""
    return model.config.sample_size if model.config.get("aggregator") == "vit" else None


def check_size(model: Autoencoder, size: int, name: str = "size") -> None:
    """Checks that the model takes RGB images of `size` x `size` pixels.

    Args:
        model: autoencoder that is to encode them.
        size: side in pixels.
        name: name of the setting, for the message.

    Raises:
        UserError: the model takes other channels, one other size alone, or only multiples of its factor f that
            are at least 2 f and 16.
    """
    if model.config.in_channels != 3:
        raise UserError(f"the model takes {model.config.in_channels} channels; images here have 3")
    if only_size(model) not in (None, size):
        raise UserError(f"{name} must be {only_size(model)}, the only one that this model takes, got {size}")
    factor = spatial_compression(model)
    minimum = max(MIN_SIZE, 2 * factor)
    if size % factor or size < minimum:
        raise UserError(f"{name} must be a multiple of {factor}, at least {minimum}, got {size}")


def encode_pixels(model: Autoencoder, pixels: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of (N, 3, H, W) uint8 pixels, on the model's device and in its dtype.

    Raises:
        UserError: the model does not take images of this size.
    """
    image = to_model_range(pixels.to(model.device, non_blocking=True))
    if not isinstance(model, LiteVAE):  # LiteVAE's first operator converts the dtype itself
        image = image.to(model.dtype)
    try:
        return model.encode(image).latent_dist
    except ValueError as error:
        raise UserError(str(error)) from None
