"""Discriminators for adversarial training: `build_discriminator`.

Each takes images (N, C, H, W) in [-1, 1] and returns a tuple of logits, one tensor per head; a larger logit means
"real". Adversarial losses are means over a head's logits. No discriminator is tied to the image size that it was
built for: training can begin at 128 and continue at 256.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from litevae.discriminators.patchgan import PatchGANDiscriminator
from litevae.discriminators.stylegan import StyleGANDiscriminator
from litevae.discriminators.unet import UNetDiscriminator
from litevae.settings import setting

CHANNELS = {"S": 32, "M": 64, "L": 128}


@dataclass
class DiscriminatorConfig:
    """Configuration of a discriminator. Table 10 of the paper compares the three kinds; it does not print widths.

    M is pix2pix's PatchGAN, StyleGAN2's config F, or a U-Net with 64 channels at its outermost level. S has half
    as many channels and L twice as many; StyleGAN2's stop at 512.
    """

    kind: Literal["unet", "patchgan", "stylegan"] = setting("unet", "Architecture of the discriminator.")
    width: Literal["S", "M", "L"] = setting(
        "M", "Number of channels relative to the published network (M): half for S, twice for L."
    )


Discriminator: TypeAlias = UNetDiscriminator | PatchGANDiscriminator | StyleGANDiscriminator


def build_discriminator(
    config: DiscriminatorConfig, size: int, *later_sizes: int, in_channels: int = 3
) -> Discriminator:
    """Returns a discriminator with random weights, drawn from PyTorch's global generator.

    Args:
        config: kind and width.
        size: side in pixels of the images that training begins with.
        later_sizes: sides of the images that training continues with.
        in_channels: number of image channels.

    Raises:
        ValueError: the kind or width is unknown, or the discriminator does not take one of the sizes.
    """
    if config.width not in CHANNELS:
        raise ValueError(f"width must be one of {', '.join(CHANNELS)}, got {config.width!r}")
    channels = CHANNELS[config.width]
    discriminator: Discriminator
    match config.kind:
        case "unet":
            discriminator = UNetDiscriminator(size, channels, in_channels)
        case "patchgan":
            discriminator = PatchGANDiscriminator(channels, in_channels)
        case "stylegan":
            discriminator = StyleGANDiscriminator(size, channels, in_channels)
        case _:
            raise ValueError(f"kind must be one of unet, patchgan, stylegan, got {config.kind!r}")
    for side in (size, *later_sizes):
        discriminator.check_size(side, side)
    return discriminator


__all__ = [
    "CHANNELS",
    "DiscriminatorConfig",
    "PatchGANDiscriminator",
    "StyleGANDiscriminator",
    "UNetDiscriminator",
    "build_discriminator",
]
