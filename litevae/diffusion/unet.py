"""The denoiser: diffusers' UNet2DModel in the shape of LDM's U-Net."""

from typing import cast

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from litevae.diffusion.config import UNetConfig
from litevae.errors import UserError
from litevae.memory import check_memory
from litevae.models.build import weights_size


def build_unet(config: UNetConfig, latent_channels: int, side: int) -> UNet2DModel:
    """Builds a U-Net with fresh weights for latents (N, latent_channels, side, side).

    With LDM's settings and 3 latent channels it has 274,056,163 parameters; LDM's U-Net, of the same layers, has
    274 M (Rombach et al., 2022, Table 12).

    Args:
        config: settings of the U-Net.
        latent_channels: channels of a latent.
        side: height and width of a latent.

    Raises:
        UserError: `side` cannot be halved between all blocks, or the weights exceed the memory of the machine.
    """
    blocks = len(config.block_out_channels)
    factor = 2 ** (blocks - 1)
    if side % factor or side < factor:
        raise UserError(
            f"latents of {side} x {side} cannot be halved {blocks - 1} times: give fewer unet.block_out_channels"
        )
    attention = [block >= config.attention_from for block in range(blocks)]
    settings = {
        "sample_size": side,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.num_groups,
        "dropout": config.dropout,
    }
    with torch.device("meta"):  # which takes no memory
        check_memory(weights_size(UNet2DModel(**settings)), "unet: weights")
    unet = UNet2DModel(**settings)
    initialise(unet)
    return unet


def initialise(unet: UNet2DModel) -> None:
    """Zeroes the last layer of each residual branch and of the network, as LDM does and diffusers does not."""
    last: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        elif isinstance(module, Attention):
            last.append(cast(nn.Module, module.to_out[0]))
    for layer in last:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
