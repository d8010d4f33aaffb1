"""Functions that work with every kind of autoencoder."""

from collections.abc import Mapping
from typing import TypeAlias

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from litevae.data.pixels import PixelFormat, count_channels, to_model_range
from litevae.data.sources import ImageSource
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


def pixel_format(model: Autoencoder) -> PixelFormat:
    """Returns what the images of a model are; `UserError` unless it takes and makes 1, 3 or 4 channels."""
    values, channels = model.config.get("value_range"), model.config.in_channels
    made = model.config.get("out_channels", channels)
    if made != channels:
        raise UserError(f"the model takes {count_channels(channels)} and makes {made}; they must be as many")
    try:
        return PixelFormat(channels, values)
    except ValueError as error:
        raise UserError(f"the model's {error}") from None


def check_images(model: Autoencoder, images: ImageSource) -> None:
    """Raises UserError unless the images of a source are what the model takes."""
    if images.pixel_format != (taken := pixel_format(model)):
        raise UserError(f"the images are {images.pixel_format}, and the model takes {taken}")


def shared_pixel_format(models: Mapping[str, Autoencoder]) -> PixelFormat:
    """Returns what the images of several models, by name, are; `UserError` if they differ."""
    formats = {name: pixel_format(model) for name, model in models.items()}
    first, *others = formats
    for name in others:
        if formats[name] != formats[first]:
            raise UserError(
                f"{first} takes {formats[first]}, and {name} takes {formats[name]}: they cannot be compared"
            )
    return formats[first]


def minimum_size(model: Autoencoder) -> int:
    """Returns the shortest side in pixels of an image that the model encodes."""
    return max(MIN_SIZE, 2 * spatial_compression(model))


def check_size(model: Autoencoder, size: int, name: str = "size") -> None:
    """Checks that the model takes images of `size` x `size` pixels.

    Args:
        model: autoencoder that will encode the images.
        size: side of the images in pixels.
        name: name of the setting in error messages.

    Raises:
        UserError: the model does not take 1, 3 or 4 channels, it takes only one other size, or the size is not a
            multiple of its factor f, or is below 2 f or 16.
    """
    pixel_format(model)
    if fixed_size(model) not in (None, size):
        raise UserError(f"{name} must be {fixed_size(model)}, the only size this model takes, got {size}")
    factor = spatial_compression(model)
    minimum = minimum_size(model)
    if size % factor or size < minimum:
        raise UserError(f"{name} must be a multiple of {factor}, at least {minimum}, got {size}")


def encode_pixels(model: Autoencoder, pixels: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of (N, C, H, W) pixels in the model's format, on its device and in its dtype.

    Raises:
        UserError: the model does not take images of this size, or of this number of channels.
    """
    if pixels.shape[1] != (channels := model.config.in_channels):
        raise UserError(f"the model takes images of {count_channels(channels)}, got {pixels.shape[1]}")
    image = to_model_range(pixels.to(model.device, non_blocking=True))
    if not isinstance(model, LiteVAE):  # LiteVAE's first operator converts the dtype
        image = image.to(model.dtype)
    try:
        return model.encode(image).latent_dist
    except ValueError as error:
        raise UserError(str(error)) from None
