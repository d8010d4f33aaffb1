"""The weights that training from scratch starts with."""

import math
from typing import cast

import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from litevae.models.encoder import Encoder, WaveletEncoder
from litevae.models.interface import Autoencoder
from litevae.models.layers import Attention, ResBlock
from litevae.models.nafnet import NAFBlock
from litevae.models.vit import TransformerBlock, ViT
from litevae_kernels.nn import SelfModulatedConv2d

INITIAL_LOGVAR = -8.0  # the noise of a larger one would hide the details of an image


@torch.no_grad()
def initialise(model: Autoencoder) -> None:
    """Initialises `model` in place, so that LiteVAE's encoder is linear and preserves what it is given.

    PyTorch's default initialisation shrinks the signal in each convolution outside the residual branches and
    adds normalised branches, which ignore brightness and colour, at full strength: for hundreds of steps the
    latent is noise and the reconstruction brown. Here the branches start at zero, as in ADM
    (Dhariwal & Nichol, 2021), whose U-Nets the encoder follows; the other convolutions are delta-orthogonal
    (Xiao et al., 2018), so that they neither blur nor lose anything that their channels can hold; and the
    posterior's standard deviation starts at exp(-4) instead of 1. The baselines are initialised in the same way.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for conv in convolutions_outside_branches(model):
        mix_orthogonally(conv)
    for module in model.modules():
        if isinstance(module, ResBlock | ResnetBlock2D):
            conv = cast(nn.Conv2d, module.conv2)
            nn.init.zeros_(conv.gain if isinstance(conv, SelfModulatedConv2d) else conv.weight)
        elif isinstance(module, Attention | DiffusersAttention):
            last_linear = cast(nn.Linear, module.to_out[0])
            nn.init.zeros_(last_linear.weight)
            nn.init.zeros_(last_linear.bias)
        elif isinstance(module, NAFBlock):
            nn.init.zeros_(module.beta)
            nn.init.zeros_(module.gamma)
            nn.init.ones_(cast(Tensor, module.attention.bias))  # zero would close its branch
        elif isinstance(module, TransformerBlock):
            for linear in (module.to_out, module.linear2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, ViT):
            nn.init.zeros_(module.pos_embed)
    if isinstance(model.encoder, WaveletEncoder):
        return
    start_variance(last_convolution(model))


def start_variance(moments: nn.Conv2d) -> None:
    """Makes a convolution to mean and log-variance begin with log-variances near `INITIAL_LOGVAR`."""
    logvar = slice(moments.out_channels // 2, None)
    moments.weight[logvar] *= 0.1
    if moments.bias is not None:
        moments.bias[logvar] = INITIAL_LOGVAR


def last_convolution(model: Autoencoder) -> nn.Conv2d:
    """Returns the convolution of a learned encoder whose output is the mean, then the log-variance."""
    last = model.encoder.feature_aggregator if isinstance(model.encoder, Encoder) else model.encoder
    return cast(nn.Conv2d, model.quant_conv or last.conv_out)


@torch.no_grad()
def fix_variance(model: Autoencoder, std: float) -> None:
    """Makes a learned encoder report the posterior's standard deviation `std` for every image, in place."""
    moments = last_convolution(model)
    logvar = slice(moments.out_channels // 2, None)
    moments.weight[logvar] = 0
    cast(Tensor, moments.bias)[logvar] = 2 * math.log(std)


def convolutions_outside_branches(model: nn.Module) -> list[nn.Conv2d]:
    """Returns the convolutions that a residual block does not bypass, with the shortcuts of the blocks."""
    inside: set[nn.Module] = set()
    for block in model.modules():
        if isinstance(block, ResBlock | ResnetBlock2D | NAFBlock):
            inside.update(set(block.modules()) - {getattr(block, "conv_shortcut", None)})
    return [conv for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv not in inside]


def mix_orthogonally(conv: nn.Conv2d) -> None:
    """Makes a convolution an orthogonal map of the pixels that belong to each output, which preserves the variance.

    These are all channels of one pixel, and of stride x stride adjacent ones if the convolution is strided
    (delta-orthogonal: Xiao et al., 2018, https://arxiv.org/abs/1806.05393, for a stride of 1).
    """
    (rows, columns), (top, left) = conv.stride, cast(tuple[int, int], conv.padding)
    inputs = conv.in_channels * rows * columns
    weights = torch.empty(conv.out_channels, inputs)
    nn.init.orthogonal_(weights, gain=max(1, conv.out_channels / inputs) ** 0.5)
    nn.init.zeros_(conv.weight)
    window = conv.weight[:, :, top : top + rows, left : left + columns]
    window.copy_(weights.view(conv.out_channels, conv.in_channels, rows, columns))
