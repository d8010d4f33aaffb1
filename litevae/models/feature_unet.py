"""The U-Net of LiteVAE's feature extraction and aggregation (Section 4.1, Appendix G)."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from litevae.models.layers import CheckpointedModule, Measured, MidBlock, Norm, ResBlock
from litevae_kernels.nn import Conv3x3

RES_BLOCKS = 2  # per level and direction, which gives the paper's parameter counts


class FeatureUNet(CheckpointedModule):
    """An ADM-style U-Net without spatial down- or upsampling: its levels differ only in width.

    Takes (N, in_channels, H, W), returns (N, out_channels, H, W).

    Args:
        in_channels, out_channels: numbers of input and output channels.
        channels: base width.
        multipliers: width of each level as a multiple of `channels`.
        num_groups: number of groups of the GroupNorms.
        norm: normalisation of the ResBlocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        num_groups: int,
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers for _ in range(RES_BLOCKS)]
        self.conv_in = Conv3x3(in_channels, channels)
        self.encoder_blocks = nn.ModuleList(
            ResBlock(before, width, num_groups, norm)
            for before, width in zip([channels, *widths], widths, strict=False)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, norm, attention=False)
        # Decoder block i takes its own input and the output of encoder block -1-i.
        up_widths = widths[::-1]
        self.decoder_blocks = nn.ModuleList(
            ResBlock(before + skip, width, num_groups, norm)
            for before, skip, width in zip([widths[-1], *up_widths], up_widths, up_widths, strict=False)
        )
        self.conv_out = Conv3x3(up_widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = Measured(self.conv_in(x))
        skips = []
        for block in self.encoder_blocks:
            h = self.hand_over(block, h, measure=True)
            skips.append(h)
        h = self.hand_over(self.mid_block, h, measure=True)
        for block in self.decoder_blocks:
            skip = skips.pop()
            h = self.hand_over(block, h, skip, measure=bool(skips))  # No norm reads the last one.
        return self.conv_out(h.values)
