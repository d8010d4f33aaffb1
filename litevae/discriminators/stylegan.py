"""The residual discriminator of StyleGAN2, with one logit per image."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae_kernels.arithmetic import widened
from litevae_kernels.nn import Conv2d

MAX_CHANNELS = 512
FINAL_SIZE = 4  # side of the last feature map
GROUP_SIZE = 4  # number of images that share a minibatch standard deviation
MIN_SIZE = 2 * FINAL_SIZE


class StyleGANDiscriminator(nn.Module):
    """The discriminator of StyleGAN2 (Karras et al., 2020), written from the paper.

    Residual blocks halve the image down to 4x4; the minibatch standard deviation (Karras et al., 2018), a
    convolution and two fully connected layers follow. Learning rates are equalised: weights start as N(0, 1)
    and are divided by the square root of their fan-in when used. Activations are leaky ReLUs of slope 0.2 with
    gain √2, and a [1, 3, 3, 1] blur precedes every downsampling.

    `size` determines the number of blocks. If an image of another size leaves a feature map that is not 4x4,
    it is averaged over a 4x4 grid of cells. At `size`, if that is a power of two, this is the network of the
    paper.

    The minibatch standard deviation is taken over groups of 4 consecutive images, or of 2 if the batch size
    is even but no multiple of 4. In an odd batch each image is a group of its own.

    Args:
        size: side in pixels of the images that training begins with.
        channels: width at 512 pixels, which doubles with each halving, up to 512. 64 is the paper's large
            network (config F), 32 its config E.
        in_channels: number of image channels, C.

    Raises:
        ValueError: the width is below 1, or the size is below 8 or has too few factors of two.
    """

    def __init__(self, size: int, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if size < MIN_SIZE:
            raise ValueError(f"size must be {MIN_SIZE} or more, got {size}")
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}")
        blocks = (size // FINAL_SIZE).bit_length() - 1
        self.multiple = 2**blocks
        self.check_size(size, size)

        # A side that is not a power of two has the widths of the next lower power of two.
        sides = [FINAL_SIZE * 2**i for i in range(blocks, -1, -1)]
        widths = [max(1, min(MAX_CHANNELS, channels * 512 // side)) for side in sides]
        last = widths[-1]
        self.from_rgb = EqualisedConv2d(in_channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResBlock(before, width) for before, width in pairwise(widths)))
        self.conv_out = EqualisedConv2d(last + 1, last, 3, padding=1)
        self.linear1 = EqualisedLinear(last * FINAL_SIZE**2, last)
        self.linear2 = EqualisedLinear(last, 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless the blocks can halve both sides."""
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"this StyleGAN discriminator takes images whose sides are multiples of {self.multiple}, "
                f"got {height}x{width}"
            )

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Returns logits (N, 1) of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: H or W is not a multiple of 2^(number of blocks), which is 32 if built for 128.
        """
        self.check_size(*image.shape[2:])
        x = self.blocks(activate(self.from_rgb(image)))
        x = activate(self.conv_out(torch.cat([x, minibatch_std(x)], dim=1)))
        if x.shape[2:] != (FINAL_SIZE, FINAL_SIZE):
            x = F.adaptive_avg_pool2d(x, FINAL_SIZE)
        return (self.linear2(activate(self.linear1(x.flatten(1)))),)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 shortcut, (N, in_channels, H, W) -> (N, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv2d(in_channels, in_channels, 3, padding=1)
        self.blur = Blur(padding=2)
        self.conv2 = EqualisedConv2d(in_channels, out_channels, 3, stride=2)
        self.blur_shortcut = Blur(padding=1, stride=2)
        self.conv_shortcut = EqualisedConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = activate(self.conv2(self.blur(activate(self.conv1(x)))))
        return (h + self.conv_shortcut(self.blur_shortcut(x))) * 0.5**0.5


class Blur(nn.Module):
    """Filters each channel by [1, 3, 3, 1]/8 in both directions, with `padding` zeros at each border."""

    taps: Tensor

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.stride = stride
        self.register_buffer("taps", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Computed in each call, because DDP writes to buffers between two calls that share a backward pass.
        kernel = (self.taps[:, None] * self.taps).expand(x.shape[1], 1, 4, 4)
        return widened(
            lambda x, kernel: F.conv2d(
                x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1]
            ),
            x,
            kernel,
        )


class EqualisedConv2d(Conv2d):
    """A convolution with an equalised learning rate (Karras et al., 2018)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight * self.weight[0].numel() ** -0.5
        return self._conv_forward(input, weight, self.bias)


class EqualisedLinear(nn.Linear):
    """A fully connected layer with an equalised learning rate."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return widened(F.linear, input, self.weight * self.in_features**-0.5, self.bias)


def activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * 2**0.5


def minibatch_std(x: Tensor) -> Tensor:
    """Returns each group's standard deviation over images, averaged over (C, H, W), as a channel (N, 1, H, W)."""
    n, _, height, width = x.shape
    group = GROUP_SIZE if n % GROUP_SIZE == 0 else 2 if n % 2 == 0 else 1
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = precise.unflatten(0, (n // group, group)).var(dim=1, correction=0)
    # The constant is inside the root, so that equal images have a finite gradient.
    std = (variance + 1e-8).sqrt().mean((1, 2, 3))
    return std.to(x.dtype).repeat_interleave(group).view(n, 1, 1, 1).expand(n, 1, height, width)
