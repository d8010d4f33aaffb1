"""LiteVAE's encoder (Section 4.1, Figure 1), and the encoders without parameters (Appendix B).

The encoder follows the pseudocode of Appendix G, with its errors corrected.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.feature_unet import FeatureUNet
from litevae.models.layers import Norm, compute_dtype
from litevae.models.nafnet import NAFNet
from litevae.models.vit import ViT
from litevae_kernels import haar_pyramid
from litevae_kernels.backend import is_tracing
from litevae_kernels.nn import Conv3x3

Extractor = Literal["unet", "nafnet"]
Aggregator = Literal["unet", "vit"]

# Without gradients, at most this many pixels of a level are processed at once, because the finest level's features
# would otherwise dominate peak memory. A CPU's limit is one 256x256 image, which costs 2 to 7% of the time; a GPU's
# limit, 16 such images, is an estimate.
SLICE_PIXELS = {"cpu": 2**14, "cuda": 2**18}


class Downsample(nn.Module):
    """Average pooling and a 3x3 convolution: (N, C, H, W) -> (N, C, H / factor, W / factor)."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(factor)
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Encoder(nn.Module):
    """Network from the image to the latent's moments.

    One network extracts features from each level of the Haar pyramid, and another aggregates them.

    Takes (N, in_channels, H, W) in [-1, 1], of any floating dtype, with H and W multiples of 2^levels;
    returns (N, out_channels, H / 2^levels, W / 2^levels) in the dtype of the convolutions and in the image's
    memory format.

    Args:
        in_channels: number of image channels.
        out_channels: number of channels of mean and log-variance together.
        levels: number of the pyramid's levels.
        extractor_channels, extractor_multipliers, aggregator_channels, aggregator_multipliers, num_groups:
            Sizes of the U-Nets. Other networks derive their own sizes from these.
        extractor, shared_extractor, aggregator, finest_level, norm: variants, as in `LiteVAE`, which
            validates them.
        image_size: height and width of the image for the "vit" aggregator, a multiple of 2^levels.
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
        *,
        extractor: Extractor = "unet",
        shared_extractor: bool = False,
        aggregator: Aggregator = "unet",
        finest_level: int = 1,
        norm: Norm = "group",
        image_size: int = 256,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.finest_level = finest_level
        self.image_size = image_size if aggregator == "vit" else None
        bands = 4 * in_channels  # the local mean and three directions of detail
        used = levels + 1 - finest_level
        self.feature_extractors = nn.ModuleList(
            NAFNet(bands, bands, extractor_channels, extractor_multipliers)
            if extractor == "nafnet"
            else FeatureUNet(bands, bands, extractor_channels, extractor_multipliers, num_groups, norm)
            # A shared extractor is held once, because safetensors stores no weight under two names.
            for _ in range(1 if shared_extractor else used)
        )
        # The coarsest level has the latent's size already.
        self.downsamplers = nn.ModuleList(
            Downsample(bands, 2 ** (levels - level)) for level in range(finest_level, levels)
        )
        self.feature_aggregator = (
            ViT(used * bands, out_channels, aggregator_channels, image_size // 2**levels)
            if aggregator == "vit"
            else FeatureUNet(
                used * bands, out_channels, aggregator_channels, aggregator_multipliers, num_groups, norm
            )
        )

    def forward(self, image: Tensor) -> Tensor:
        """Returns the moments of images.

        Raises:
            ValueError: the aggregator is "vit" and the images do not have the size `image_size`.
        """
        size = self.image_size
        if size is not None and not is_tracing() and image.shape[2:] != (size, size):
            raise ValueError(
                f"image must be {size}x{size}, the sample_size that aggregator='vit' was made for, "
                f"got {image.shape[2]}x{image.shape[3]}"
            )
        dtype = compute_dtype(self.feature_aggregator.conv_in, image.device, self)
        pyramid = haar_pyramid(image, self.levels, dtype=dtype)[self.finest_level - 1 :]
        features = [self.extract(i, level) for i, level in enumerate(pyramid)]
        return self.feature_aggregator(torch.cat(features, dim=1))

    def extract(self, index: int, level: Tensor) -> Tensor:
        """Returns the features of one level at the latent's size.

        Without gradients, the batch is processed in slices if it is large.

        Args:
            index: position of the level, 0 for the finest one in use.
            level: sub-bands (N, 4 in_channels, H, W).
        """
        # A compiler plans memory itself, and a trace would keep the slices of its example.
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing()):
            pixels = max(1, level.shape[2] * level.shape[3])
            images = max(1, SLICE_PIXELS.get(level.device.type, len(level) * pixels) // pixels)
            if images < len(level):
                return torch.cat([self.extract(index, part) for part in level.split(images)])
        extractor = self.feature_extractors[index % len(self.feature_extractors)]  # the only one, if shared
        features: Tensor = extractor(level)
        return self.downsamplers[index](features) if index < len(self.downsamplers) else features


class WaveletEncoder(nn.Module):
    """Encoder without parameters (Appendix B): the moments are the coarsest sub-bands of a Haar pyramid.

    Takes (N, C, H, W) in [-1, 1], of any floating dtype; returns (N, 8 C s^2, H / f, W / f) with
    f = 2^levels s, in the model's dtype, or autocast's, and in the image's memory format. The first half is
    the mean: the sub-bands, scaled by 2^-levels and rearranged by space-to-depth. The second half is the
    log-variance, the lowest that `DiagonalGaussianDistribution` allows: a sample equals the mean to within a
    few float32 roundings.

    Args:
        levels: number of the pyramid's levels.
        space_to_depth: factor s of space-to-depth.
    """

    logvar: Tensor

    def __init__(self, levels: int, space_to_depth: int) -> None:
        super().__init__()
        self.levels = levels
        self.space_to_depth = space_to_depth
        # A buffer, because it also tells the model's dtype and device.
        self.register_buffer("logvar", torch.tensor(-30.0), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        bands = haar_pyramid(image, self.levels, dtype=compute_dtype(self, image.device))[-1]
        mean = F.pixel_unshuffle(bands, self.space_to_depth)
        logvar = torch.zeros_like(mean) + self.logvar  # an expanded tensor would lose the memory format
        return torch.cat([mean, logvar], dim=1)
