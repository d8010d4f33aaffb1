"""The U-Net discriminator, with one logit per pixel and one per image."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import register_parametrization

from litevae_kernels.nn import Conv2d, Conv3x3, Linear

# Widths of the encoder path, as multiples of `channels` (Schönfeld et al., 2020). The decoder path mirrors all but
# the innermost, and repeats the outermost.
MULTIPLIERS_128 = (1, 2, 4, 8, 16)
MULTIPLIERS_256 = (1, 2, 4, 8, 8, 16)


class UNetDiscriminator(nn.Module):
    """The discriminator of LiteVAE: "A U-Net Based Discriminator for GANs" (Schönfeld et al., 2020).

    It is a BigGAN discriminator (Brock et al., 2019) with an added decoder path and concatenated skips; every
    layer is spectrally normalised and starts orthogonal. It has neither the class projection nor the optional
    non-local block. It takes any image size: odd sizes are rounded up in the encoder path and cropped back in
    the decoder path. The bottleneck's features are averaged and multiplied by 16, which equals BigGAN's sum
    over 4x4 at the size that the layout was made for, and keeps the scale at other sizes.

    In training mode each forward pass performs one step of the power iteration on buffers, even if the
    parameters are frozen.

    Args:
        size: side in pixels of the images that training begins with. Below 256 the network has the five
            levels of the paper's layout for 128, otherwise the six of its layout for 256.
        channels: width of the outermost level; the innermost one is 16 times as wide.
        in_channels: number of image channels, C.

    Raises:
        ValueError: the size or the width is below 1.
    """

    def __init__(self, size: int, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if size < 1 or channels < 1:
            raise ValueError(f"size and channels must be 1 or more, got {size} and {channels}")
        down = [channels * m for m in (MULTIPLIERS_128 if size < 256 else MULTIPLIERS_256)]
        up = [*down[-2::-1], channels]
        skips = [0, *down[-2::-1]]  # the innermost block of the decoder path has none
        self.down_blocks = nn.ModuleList(
            ResBlock(before, width, "down", preactivate=i > 0)
            for i, (before, width) in enumerate(zip([in_channels, *down], down, strict=False))
        )
        self.up_blocks = nn.ModuleList(
            ResBlock(before + skip, width, "up")
            for before, skip, width in zip([down[-1], *up], skips, up, strict=False)
        )
        self.bottleneck_head = normalised(Linear(down[-1], 1))
        self.pixel_head = normalised(Conv2d(channels, 1, 1))

    def check_size(self, height: int, width: int) -> None:
        """Accepts every size."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (N, 1, H, W) per pixel and (N, 1) per image, of images (N, C, H, W) in [-1, 1]."""
        x, inputs = image, []
        for block in self.down_blocks:
            inputs.append(x)
            x = block(x)
        image_logits = self.bottleneck_head(16 * F.relu(x).mean((2, 3)))
        for block in self.up_blocks:
            skip = inputs.pop()
            x = block(x)[:, :, : skip.shape[2], : skip.shape[3]]
            if inputs:  # the image itself is not concatenated
                x = torch.cat([x, skip], dim=1)
        return self.pixel_head(F.relu(x)), image_logits


class ResBlock(nn.Module):
    """BigGAN's residual block: ReLU, 3x3 convolution, ReLU, 3x3 convolution, and a 1x1 shortcut.

    Takes (N, in_channels, H, W). "down" returns (N, out_channels, ⌈H/2⌉, ⌈W/2⌉) by average pooling at the
    end, "up" (N, out_channels, 2H, 2W) by nearest-neighbour upsampling before the first convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, resample: Literal["down", "up"], preactivate: bool = True
    ) -> None:
        super().__init__()
        self.resample = resample
        self.preactivate = preactivate
        self.conv1 = normalised(Conv3x3(in_channels, out_channels))
        self.conv2 = normalised(Conv3x3(out_channels, out_channels))
        self.conv_shortcut = normalised(Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if self.preactivate else x
        # The 1x1 convolution commutes with pooling and upsampling, and is cheaper at the lower resolution.
        if self.resample == "down":
            h = self.conv2(F.relu(self.conv1(h)))
            return downsample(h) + self.conv_shortcut(downsample(x))
        h = self.conv2(F.relu(self.conv1(upsample(h))))
        return h + upsample(self.conv_shortcut(x))


def downsample(x: Tensor) -> Tensor:
    """Returns the means of 2x2 pixels; at the end of an odd side, of the pixels that exist."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def normalised(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Initialises `layer` with orthogonal weights and zero bias, and adds spectral normalisation."""
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value (Miyato et al., 2018).

    It equals `torch.nn.utils.parametrizations.spectral_norm` with half as many passes over the weights, which
    dominate memory traffic if a step has few images. Each call in training mode performs one step of the power
    iteration on `u`, the left singular vector.
    """

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", F.normalize(weight.new_empty(len(weight)).normal_(), dim=0))
        with torch.no_grad():
            self(weight)  # one step is enough: an orthogonal weight's singular values are all 1

    def forward(self, weight: Tensor) -> Tensor:
        matrix = as_matrix(weight.detach())
        # Autocast would compute the matrix products in bfloat16. The meta device has no autocast.
        with torch.no_grad(), torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
            v = F.normalize(matrix.T @ self.u, dim=0)
            product, u = matrix @ v, self.u
            if self.training:
                u = F.normalize(product, dim=0)
                self.u.copy_(u)
            sigma = u @ product
        normalised: Tensor = DivideBySingularValue.apply(weight, sigma, u, v)
        return normalised


class DivideBySingularValue(torch.autograd.Function):
    """Computes weight / sigma, where sigma = u^T weight v, and u and v are constants."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(weight, sigma, u, v)
        return weight / sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, sigma, u, v = ctx.saved_tensors
        grad = torch.div(grad, sigma, out=torch.empty_like(weight))  # in the weight's memory format
        slope = as_matrix(grad).flatten() @ as_matrix(weight).flatten() / sigma
        as_matrix(grad).addr_(-slope * u, v)
        return grad, None, None, None


def as_matrix(weight: Tensor) -> Tensor:
    """Returns a weight (C_out, ...) as a matrix with C_out rows, with the columns in memory order.

    A permutation of the columns changes no singular value.
    """
    return weight.flatten(1) if weight.is_contiguous() else weight.movedim(1, -1).flatten(1)
