"""The U-Net of LiteVAE's feature extraction and aggregation (Section 4.1, Appendix G)."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from litevae.models.layers import CheckpointedModule, MidBlock, Norm, ResBlock

RES_BLOCKS = 2  # a level, on the way down and up; with it the parameter counts are the paper's


class FeatureUNet(CheckpointedModule):
    """An ADM-style U-Net with no spatial down- or upsampling: its levels differ in width only.

    Takes (N, in_channels, H, W), returns (N, out_channels, H, W). `multipliers` gives each level's width as
    a multiple of `channels`; `norm` is the ResBlocks'.
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
        self.conv_in = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.encoder_blocks = nn.ModuleList(
            ResBlock(before, width, num_groups, norm)
            for before, width in zip([channels, *widths], widths, strict=False)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, norm, attention=False)
        # block i of the way up gets the output of block -1-i of the way down beside its own input
        up = widths[::-1]
        self.decoder_blocks = nn.ModuleList(
            ResBlock(before + skip, width, num_groups, norm)
            for before, skip, width in zip([widths[-1], *up], up, up, strict=False)
        )
        self.conv_out = nn.Conv2d(up[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []
        for block in self.encoder_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.decoder_blocks:
            x = self.run(block, x, skips.pop())
        return self.conv_out(x)
