"""The PatchGAN discriminator: logits for overlapping patches."""

from torch import Tensor, nn

MIN_SIZE = 24  # three halvings, and two 4x4 convolutions that lose a pixel each
LAYERS = ((1, 2), (2, 2), (4, 2), (8, 1))  # width as a multiple of `channels`, and stride


class PatchGANDiscriminator(nn.Module):
    """The 70x70 PatchGAN of pix2pix (Isola et al., 2017), with which Stable Diffusion's VAE was trained.

    4x4 convolutions, three of stride 2 and one of stride 1, leaky ReLU of slope 0.2, BatchNorm in all but
    the first; weights start as N(0, 0.02²), BatchNorm's as N(1, 0.02²).

    BatchNorm takes its statistics from the batch at hand, so real and generated images go through in
    separate calls, and the module stays in training mode.

    Args:
        channels: width of the first layer, 64 in the paper.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}")
        layers: list[nn.Module] = []
        before = 3
        for multiplier, stride in LAYERS:
            width, first = channels * multiplier, not layers
            layers.append(nn.Conv2d(before, width, 4, stride, padding=1, bias=first))
            if not first:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            before = width
        layers.append(nn.Conv2d(before, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def check_size(self, height: int, width: int) -> None:
        """ValueError unless images of this size leave at least one patch."""
        if min(height, width) < MIN_SIZE:
            raise ValueError(
                f"PatchGAN takes images of at least {MIN_SIZE} pixels a side, got {height}x{width}"
            )

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W) in [-1, 1] to logits (N, 1, ⌊H/8⌋ - 2, ⌊W/8⌋ - 2).

        Raises:
            ValueError: H or W below 24.
        """
        self.check_size(*image.shape[2:])
        return (self.layers(image),)
