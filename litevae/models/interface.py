"""Functions that work with every kind of autoencoder."""

from typing import TypeAlias

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from litevae.data.images import to_model_range
from litevae.errors import UserError
from litevae.models.autoencoder import LiteVAE

Autoencoder: TypeAlias = LiteVAE | AutoencoderKL

MIN_SIZE = 16  # pixels, the least that VGG16 and SSIM's window need


def spatial_compression(model: Autoencoder) -> int:
    """Returns f, the number of image pixels per latent pixel along a side."""
    return 2 ** (len(model.config.block_out_channels) - 1)


def fixed_size(model: Autoencoder) -> int | None:
    """Returns the side of the only images, or tiles, that the model encodes; None if it is not limited to one."""
    return model.config.sample_size if model.config.get("aggregator") == "vit" else None


def check_rgb(model: Autoencoder) -> None:
    """Raises UserError unless the model takes images of 3 channels."""
    if model.config.in_channels != 3:
        raise UserError(f"the model takes {model.config.in_channels} channels; images here have 3")


def minimum_size(model: Autoencoder) -> int:
    """Returns the shortest side in pixels of an image that the model encodes."""
    return max(MIN_SIZE, 2 * spatial_compression(model))


def check_size(model: Autoencoder, size: int, name: str = "size") -> None:
    """Checks that the model takes RGB images of `size` x `size` pixels.

    Args:
        model: autoencoder that will encode the images.
        size: side of the images in pixels.
        name: name of the setting in error messages.

    Raises:
        UserError: the model does not take RGB images, it takes only one other size, or the size is not a
            multiple of its factor f, or is below 2 f or 16.
    """
    check_rgb(model)
    if fixed_size(model) not in (None, size):
        raise UserError(f"{name} must be {fixed_size(model)}, the only size this model takes, got {size}")
    factor = spatial_compression(model)
    minimum = minimum_size(model)
    if size % factor or size < minimum:
        raise UserError(f"{name} must be a multiple of {factor}, at least {minimum}, got {size}")


def encode_pixels(model: Autoencoder, pixels: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of (N, 3, H, W) uint8 pixels, on the model's device and in its dtype.

    Raises:
        UserError: the model does not take images of this size.
    """
    image = to_model_range(pixels.to(model.device, non_blocking=True))
    if not isinstance(model, LiteVAE):  # LiteVAE's first operator converts the dtype
        image = image.to(model.dtype)
    try:
        return model.encode(image).latent_dist
    except ValueError as error:
        raise UserError(str(error)) from None
