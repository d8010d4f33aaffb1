"""Models with random weights, built from their configuration."""

from dataclasses import asdict

import torch
from diffusers import AutoencoderKL
from torch import nn

from litevae.data.pixels import RGB, PixelFormat
from litevae.memory import check_memory
from litevae.models import LiteVAE
from litevae.models.arguments import check_arguments
from litevae.models.baseline import SmallEncoderVAE
from litevae.models.config import ModelConfig
from litevae.models.initialise import initialise
from litevae.models.interface import Autoencoder
from litevae.models.wavelet_start import initialise_as_wavelet


def with_fresh_weights(
    config: ModelConfig, size: int, wavelet: bool = False, pixel_format: PixelFormat = RGB
) -> Autoencoder:
    """Returns a model with the weights that training starts from.

    Args:
        config: kind and settings of the model.
        size: side of the training images in pixels.
        wavelet: whether the latent starts as sub-bands of the image, as `initialise_as_wavelet` makes it.
        pixel_format: what the training images are.

    Raises:
        ValueError: the model does not take these settings, or cannot start as `wavelet` asks.
        UserError: its weights exceed the memory of the machine.
    """
    with torch.device("meta"):  # which takes no memory
        check_memory(weights_size(build(config, size, pixel_format)), "weights")
    model = build(config, size, pixel_format)
    (initialise_as_wavelet if wavelet else initialise)(model)
    return model


def weights_size(model: nn.Module) -> int:
    """Returns the number of bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def build(config: ModelConfig, size: int, pixel_format: PixelFormat = RGB) -> Autoencoder:
    """Returns a model with PyTorch's initial weights; `ValueError` if it does not take the settings."""
    if config.kind != "litevae":
        return build_baseline(config, size, pixel_format)
    settings = asdict(config)
    for name in ("kind", "preset", "encoder_block_out_channels"):
        del settings[name]
    return LiteVAE.from_preset(
        config.preset,
        sample_size=size,
        in_channels=pixel_format.channels,
        value_range=pixel_format.value_range,
        **settings,
    )


def build_baseline(config: ModelConfig, size: int, pixel_format: PixelFormat) -> AutoencoderKL:
    if pixel_format.value_range is not None:  # AutoencoderKL's configuration cannot hold it
        raise ValueError(f"value_range is for kind=litevae, and must be null for kind={config.kind}")
    settings = {
        "in_channels": pixel_format.channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.num_groups,
        "use_quant_conv": config.use_1x1_conv,
        "use_post_quant_conv": config.use_1x1_conv,
        "sample_size": size,
        "scaling_factor": 1.0,
    }
    if config.encoder_block_out_channels:
        return SmallEncoderVAE(tuple(config.encoder_block_out_channels), **settings)
    if config.kind == "vae-small":
        return SmallEncoderVAE(**settings)
    blocks = len(config.block_out_channels)
    check_arguments(settings)
    return AutoencoderKL(
        out_channels=pixel_format.channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        force_upcast=False,
        **settings,
    )
