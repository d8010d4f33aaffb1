"""The decoder: Stable Diffusion's with diffusers' parameter names (Section 4.1), or one with SMC (Section 4.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.layers import CheckpointedModule, Measured, MidBlock, Norm, ResBlock, norm_silu
from litevae_kernels.nn import Conv3x3


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution: (N, C, H, W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(CheckpointedModule):
    """`num_layers` ResBlocks, followed by an upsampler if `upsample` is set."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        num_groups: int,
        norm: Norm,
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, num_groups, norm)
            for i in range(num_layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        h = Measured(x)
        for resnet in self.resnets:
            h = self.hand_over(resnet, h, measure=resnet is not self.resnets[-1])
        x = h.values
        for upsampler in self.upsamplers:
            x = self.run(upsampler, x)
        return x


class Decoder(nn.Module):
    """Network from the latent to the image, or to the image's sub-bands.

    Takes (N, in_channels, h, w), returns (N, out_channels, 2^num_upsamplers h, 2^num_upsamplers w).
    With `norm="group"` the parameters' names and the outputs equal those of diffusers'
    `models.autoencoders.vae.Decoder`. Otherwise the ResBlocks and the output have no norm, and the ResBlocks'
    convolutions are self-modulated with `norm="smc"` and plain with `norm="none"`; the attention always keeps
    its GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        num_groups: int,
        norm: Norm,
        num_upsamplers: int,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)[::-1]
        self.conv_in = Conv3x3(in_channels, widths[0])
        self.mid_block = MidBlock(widths[0], num_groups, norm, attention=True)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, layers_per_block + 1, num_groups, norm, upsample=i < num_upsamplers)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.conv_norm_out = norm_silu(widths[-1], num_groups, norm)
        self.conv_out = Conv3x3(widths[-1], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for up_block in self.up_blocks:
            x = up_block(x)
        return self.conv_out(self.conv_norm_out(x))
