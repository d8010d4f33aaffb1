"""A vision transformer for feature aggregation (Appendix D.5; Dosovitskiy et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.layers import EPS, CheckpointedModule
from litevae_kernels.arithmetic import widened
from litevae_kernels.nn import Conv2d, Linear

BLOCKS = 4
HEADS = 4


class TransformerBlock(nn.Module):
    """A pre-norm transformer block, (N, tokens, channels) -> (N, tokens, channels).

    Computes x + attention(norm1(x)), then x + mlp(norm2(x)) with a hidden layer of width 4 `channels`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=EPS)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=EPS)
        self.linear1 = Linear(channels, 4 * channels)
        self.linear2 = Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, channels / heads)
        h = widened(F.scaled_dot_product_attention, q, k, v)
        x = x + self.to_out(h.transpose(1, 2).flatten(2))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class ViT(CheckpointedModule):
    """A transformer with one token per latent pixel and a learned position embedding.

    Takes (N, in_channels, size, size) and no other size, returns (N, out_channels, size, size) in the input's
    memory format. The paper prints only the number of parameters, 0.84 M (Table 20). This network has a 3x3
    convolution to 4 `channels`, four blocks with four heads, and a 1x1 convolution. In LiteVAE-B these have
    835,720 parameters with 4 latent channels and 837,784 with 12; the position embedding has 128 size^2 more.
    As in the U-Net, no norm follows the last block, so the latent keeps the features' scale.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, size: int) -> None:
        super().__init__()
        width = HEADS * channels
        self.conv_in = Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.pos_embed = nn.Parameter(torch.empty(width, size, size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(BLOCKS))
        self.conv_out = Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        contiguous, size = x.is_contiguous(), x.shape[2:]
        x = self.conv_in(x)
        x = x + self.pos_embed.to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        x = tokens.transpose(1, 2).unflatten(2, size)
        return self.conv_out(x.contiguous() if contiguous else x)
