"""The U-Net discriminator: logits for every pixel and one for the image."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import register_parametrization

from litevae_kernels.nn import Conv3x3

# Widths of the way down, as multiples of `channels` (Schönfeld et al., 2020). The way up mirrors all but the
# innermost, and repeats the outermost.
MULTIPLIERS_128 = (1, 2, 4, 8, 16)
MULTIPLIERS_256 = (1, 2, 4, 8, 8, 16)


class UNetDiscriminator(nn.Module):
    """The discriminator of LiteVAE: "A U-Net Based Discriminator for GANs" (Schönfeld et al., 2020).

    A BigGAN discriminator (Brock et al., 2019) with a way back up and concatenated skips; every layer is
    spectrally normalised and starts orthogonal. It has neither the class projection nor the optional
    non-local block. Any image size will do: odd sizes round up on the way down and are cut back on the way
    up. The bottleneck's features are averaged and multiplied by 16, which is BigGAN's sum over 4x4 at the
    size that the layout was made for, and has the same scale at all others.

    In training mode each forward pass does one step of the power iteration, on buffers, whether or not the
    parameters are frozen.

    Args:
        size: side in pixels of the images to begin with. Below 256 the network has the five levels of the
            paper's layout for 128, from there on the six of that for 256.
        channels: width of the outermost level; the innermost has 16 times as many.

    Raises:
        ValueError: a size or a width below 1.
    """

    def __init__(self, size: int, channels: int = 64) -> None:
        super().__init__()
        if size < 1 or channels < 1:
            raise ValueError(f"size and channels must be 1 or more, got {size} and {channels}")
        down = [channels * m for m in (MULTIPLIERS_128 if size < 256 else MULTIPLIERS_256)]
        up = [*down[-2::-1], channels]
        skips = [0, *down[-2::-1]]  # the innermost block of the way up has none
        self.down_blocks = nn.ModuleList(
            ResBlock(before, width, "down", preactivate=i > 0)
            for i, (before, width) in enumerate(zip([3, *down], down, strict=False))
        )
        self.up_blocks = nn.ModuleList(
            ResBlock(before + skip, width, "up")
            for before, skip, width in zip([down[-1], *up], skips, up, strict=False)
        )
        self.bottleneck_head = normalised(nn.Linear(down[-1], 1))
        self.pixel_head = normalised(nn.Conv2d(channels, 1, 1))

    def check_size(self, height: int, width: int) -> None:
        """Any will do."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] to logits (N, 1, H, W) of the pixels and (N, 1) of the whole image."""
        x, inputs = image, []
        for block in self.down_blocks:
            inputs.append(x)
            x = block(x)
        whole = self.bottleneck_head(16 * F.relu(x).mean((2, 3)))
        for block in self.up_blocks:
            skip = inputs.pop()
            x = block(x)[:, :, : skip.shape[2], : skip.shape[3]]
            if inputs:  # the image itself is no skip
                x = torch.cat([x, skip], dim=1)
        return self.pixel_head(F.relu(x)), whole


class ResBlock(nn.Module):
    """BigGAN's: ReLU, 3x3 convolution, ReLU, 3x3 convolution, and a 1x1 convolution beside them.

    (N, in_channels, H, W) to (N, out_channels, ⌈H/2⌉, ⌈W/2⌉) by average pooling at the end, or to
    (N, out_channels, 2H, 2W) by nearest-neighbour upsampling before the first convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, resample: Literal["down", "up"], preactivate: bool = True
    ) -> None:
        super().__init__()
        self.resample = resample
        self.preactivate = preactivate
        self.conv1 = normalised(Conv3x3(in_channels, out_channels))
        self.conv2 = normalised(Conv3x3(out_channels, out_channels))
        self.conv_shortcut = normalised(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if self.preactivate else x
        # the 1x1 convolution commutes with pooling and upsampling, and is cheaper at the lower resolution
        if self.resample == "down":
            h = self.conv2(F.relu(self.conv1(h)))
            return halve(h) + self.conv_shortcut(halve(x))
        h = self.conv2(F.relu(self.conv1(double(h))))
        return h + double(self.conv_shortcut(x))


def halve(x: Tensor) -> Tensor:
    """Means of 2x2 pixels; at the end of an odd side, of those that are there."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def normalised(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """`layer`, orthogonal and without bias to start with, divided by its largest singular value."""
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class SpectralNorm(nn.Module):
    """A weight divided by its largest singular value (Miyato et al., 2018).

    `torch.nn.utils.parametrizations.spectral_norm` in half the passes over the weights, which are most of what a step
    with few images has to read and write. Each call in training mode does one step of the power iteration on `u`, the
    left singular vector.
    """

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", F.normalize(weight.new_empty(len(weight)).normal_(), dim=0))
        with torch.no_grad():
            self(weight)  # an orthogonal weight's singular values are all 1, so that one step is enough

    def forward(self, weight: Tensor) -> Tensor:
        matrix = as_matrix(weight.detach())
        # a matrix product under autocast would be bfloat16's; the meta device knows no autocast
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
    """weight / sigma, where sigma = u^T weight v, and u and v are no variables."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(weight, sigma, u, v)
        return weight / sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, sigma, u, v = ctx.saved_tensors
        grad = torch.div(grad, sigma, out=torch.empty_like(weight))  # in its memory format
        slope = as_matrix(grad).flatten() @ as_matrix(weight).flatten() / sigma
        as_matrix(grad).addr_(-slope * u, v)
        return grad, None, None, None


def as_matrix(weight: Tensor) -> Tensor:
    """(C_out, ...) as C_out rows, in the memory's order: a permutation of the columns changes no singular value."""
    return weight.flatten(1) if weight.is_contiguous() else weight.movedim(1, -1).flatten(1)
