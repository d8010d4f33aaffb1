"""The PatchGAN discriminator, with logits for overlapping patches."""

from torch import Tensor, nn

from litevae_kernels.nn import Conv2d

MIN_SIZE = 24  # pixels; three halvings leave 3, and two 4x4 convolutions of stride 1 remove one each
LAYERS = ((1, 2), (2, 2), (4, 2), (8, 1))  # width as a multiple of `channels`, and stride


class PatchGANDiscriminator(nn.Module):
    """The 70x70 PatchGAN of pix2pix (Isola et al., 2017), with which Stable Diffusion's VAE was trained.

    It has 4x4 convolutions, three of stride 2 and then two of stride 1. A leaky ReLU of slope 0.2 follows all
    but the last, and BatchNorm all but the first and the last. Weights start as N(0, 0.02²), BatchNorm's as
    N(1, 0.02²).

    BatchNorm uses the statistics of the current batch. Real and generated images therefore need separate
    calls, and the module must stay in training mode.

    Args:
        channels: width of the first layer, 64 in the paper.
        in_channels: number of image channels, C.

    Raises:
        ValueError: the width is below 1.
    """

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}")
        layers: list[nn.Module] = []
        before = in_channels
        for multiplier, stride in LAYERS:
            width, first = channels * multiplier, not layers
            layers.append(Conv2d(before, width, 4, stride, padding=1, bias=first))
            if not first:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            before = width
        layers.append(Conv2d(before, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless images of this size give at least one logit."""
        if min(height, width) < MIN_SIZE:
            raise ValueError(
                f"PatchGAN takes images of at least {MIN_SIZE} pixels a side, got {height}x{width}"
            )

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Returns logits (N, 1, ⌊H/8⌋ - 2, ⌊W/8⌋ - 2) of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: H or W is below 24.
        """
        self.check_size(*image.shape[2:])
        return (self.layers(image),)
