"""NAFNet for feature extraction (Appendix D.3; Chen et al., 2022, "Simple Baselines for Image Restoration")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.layers import EPS, CheckpointedModule
from litevae_kernels.nn import Conv2d

BLOCKS = 8  # per level of the U-Net that it replaces


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of (N, C, H, W) that keeps the memory format.

    Its statistics are float32 (float64 for float64), whatever the input's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.permute(0, 2, 3, 1)
        normed = F.layer_norm(tokens, self.normalized_shape, self.weight, self.bias, self.eps)
        normed = normed.permute(0, 3, 1, 2)
        return normed.contiguous() if input.is_contiguous() else normed


def gate(x: Tensor) -> Tensor:
    """Returns the product of the two halves of the channels (SimpleGate): (N, 2 C, H, W) -> (N, C, H, W)."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFBlock(nn.Module):
    """Two residual branches without activation functions, (N, channels, H, W) -> (N, channels, H, W).

    The first branch is a norm, a 1x1 convolution to twice the channels, a 3x3 depthwise convolution, a gate,
    simplified channel attention and a 1x1 convolution. The second is a norm, a 1x1 convolution to twice the
    channels, a gate and a 1x1 convolution. Each branch has a learned scale per channel, `beta` and `gamma`,
    which starts at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.norm1 = LayerNorm2d(channels, eps=EPS)
        self.expand1 = Conv2d(channels, wide, 1)
        self.depthwise = Conv2d(wide, wide, kernel_size=3, padding=1, groups=wide)
        self.attention = Conv2d(channels, channels, 1)
        self.project1 = Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm2d(channels, eps=EPS)
        self.expand2 = Conv2d(channels, wide, 1)
        self.project2 = Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = gate(self.depthwise(self.expand1(self.norm1(x))))
        h = self.project1(h * self.attention(h.mean(dim=(2, 3), keepdim=True)))
        x = x + h * self.beta.to(h.dtype)  # under autocast, a float32 factor would give float32
        h = self.project2(gate(self.expand2(self.norm2(x))))
        return x + h * self.gamma.to(h.dtype)


class NAFNet(CheckpointedModule):
    """NAFBlocks of one width between two 3x3 convolutions, without spatial down- or upsampling.

    Takes (N, in_channels, H, W), returns (N, out_channels, H, W). The paper prints neither width nor depth.
    Here the width is that of the U-Net's widest level, `channels` times the largest of `multipliers`, and
    there are eight blocks per level. In LiteVAE-B each network has 1.65 M parameters, and each U-Net 1.69 M.
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, multipliers: Sequence[int]
    ) -> None:
        super().__init__()
        width = channels * max(multipliers)
        self.conv_in = Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(NAFBlock(width) for _ in range(BLOCKS * len(multipliers)))
        self.conv_out = Conv2d(width, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.conv_out(x)
