"""LiteVAE's encoder (Section 4.1, Figure 2, Appendix G with its errors corrected)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litevae.models.feature_unet import FeatureUNet
from litevae.models.layers import compute_dtype
from litevae_kernels import haar_pyramid

# Pixels of a level at once, without gradients: the finest level's features would otherwise be the peak of the
# memory. On a CPU that is one image of 256 pixels a side, which costs 2 to 7% of the time; a GPU's 16 are a guess.
SLICE_PIXELS = {"cpu": 2**14, "cuda": 2**18}


class Downsample(nn.Module):
    """(N, C, H, W) -> (N, C, H / factor, W / factor): the mean of each square, then a 3x3 convolution."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(factor)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Encoder(nn.Module):
    """Image to features: one U-Net for each level of the Haar pyramid, and one that joins them.

    Takes (N, in_channels, H, W) in [-1, 1], of any floating dtype, with H and W multiples of 2^levels;
    returns (N, out_channels, H / 2^levels, W / 2^levels) in the dtype the convolutions run in and in the
    image's memory format. `out_channels` counts mean and log-variance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int,
        extractor_channels: int,
        extractor_multipliers: Sequence[int],
        aggregator_channels: int,
        aggregator_multipliers: Sequence[int],
        num_groups: int,
    ) -> None:
        super().__init__()
        self.levels = levels
        bands = 4 * in_channels  # a sub-band each for the mean and the three directions of detail
        self.feature_extractors = nn.ModuleList(
            FeatureUNet(bands, bands, extractor_channels, extractor_multipliers, num_groups)
            for _ in range(levels)
        )
        # from the finest level, by 4 and by 2; the coarsest has the latent's size already
        self.downsamplers = nn.ModuleList(
            Downsample(bands, 2 ** (levels - level)) for level in range(1, levels)
        )
        self.feature_aggregator = FeatureUNet(
            levels * bands, out_channels, aggregator_channels, aggregator_multipliers, num_groups
        )

    def forward(self, image: Tensor) -> Tensor:
        dtype = compute_dtype(self.feature_aggregator.conv_in, image.device)
        pyramid = haar_pyramid(image, self.levels, dtype=dtype)
        features = [self.extract(i, level) for i, level in enumerate(pyramid)]
        return self.feature_aggregator(torch.cat(features, dim=1))

    def extract(self, index: int, level: Tensor) -> Tensor:
        """One level of the pyramid to its features at the latent's size; without gradients slice by slice."""
        images = len(level)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # a compiler plans memory itself
            pixels = max(1, level.shape[2] * level.shape[3])
            images = max(1, SLICE_PIXELS.get(level.device.type, images * pixels) // pixels)
        if images < len(level):
            return torch.cat([self.extract(index, part) for part in level.split(images)])
        features: Tensor = self.feature_extractors[index](level)
        return self.downsamplers[index](features) if index < len(self.downsamplers) else features
