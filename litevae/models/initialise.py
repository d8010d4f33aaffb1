"""The weights that training from scratch starts with."""

import math
from typing import cast

import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from litevae.models.autoencoder import LiteVAE
from litevae.models.encoder import Encoder, WaveletEncoder
from litevae.models.feature_unet import FeatureUNet
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


@torch.no_grad()
def initialise_as_wavelet(model: Autoencoder) -> None:
    """Initialises `model` in place, so that its latent consists of sub-bands of the image.

    Everything starts as in `initialise`, but the convolutions outside of the residual branches pass the first
    channels on. The posterior's mean is then the first coefficients of the coarsest wavelet level: the local means of
    the colours, then their details. The decoder repeats each local mean. It cannot add the details linearly, because
    a convolution does not know at which copy of a repeated value it is.

    Raises:
        ValueError: the model has no such path: it is not a LiteVAE with U-Nets and a decoder with `decoder_norm="smc"`,
            or a layer has too few channels.
    """
    if not isinstance(model, LiteVAE) or not (
        isinstance(encoder := model.encoder, Encoder)
        and isinstance(extractor := encoder.feature_extractors[-1], FeatureUNet)
        and isinstance(aggregator := encoder.feature_aggregator, FeatureUNet)
        and model.config.decoder_norm == "smc"
    ):
        raise ValueError(
            "initialise=wavelet needs a LiteVAE with learned U-Nets and model.decoder_norm=smc, whose signal is not "
            "normalised on its way"
        )
    bands, colours = extractor.conv_out.out_channels, model.config.in_channels
    passed = min(bands, model.config.latent_channels)
    # The decoder carries each coefficient twice.
    carried = min(passed, min(model.config.block_out_channels) // 2)
    if min(extractor.conv_in.out_channels, aggregator.conv_in.out_channels) < passed or carried < colours:
        raise ValueError(
            f"initialise=wavelet needs decoder blocks of at least {2 * colours} channels, {colours} latent channels "
            f"and an encoder of at least {passed} channels"
        )
    initialise(model)
    coarsest = aggregator.conv_in.in_channels - bands  # first input channel of the coarsest level
    for unet, first in ((extractor, 0), (aggregator, coarsest)):
        pass_on(unet.conv_in, passed, first)
        for block in res_blocks(unet):
            pass_on(block.conv_shortcut, passed)
        pass_on(unet.conv_out, passed)
    decoder = model.decoder
    # SiLU precedes the decoder's last convolution, and silu(x) - silu(-x) = x.
    pass_on(decoder.conv_in, carried)
    decoder.conv_in.weight[carried : 2 * carried] = -decoder.conv_in.weight[:carried]
    for block in res_blocks(decoder):
        pass_on(block.conv_shortcut, 2 * carried)
    for up_block in decoder.up_blocks:
        for upsampler in up_block.upsamplers:
            pass_on(upsampler.conv, 2 * carried)
    nn.init.zeros_(decoder.conv_out.weight)
    for sign, first in ((1, 0), (-1, carried)):
        centre(decoder.conv_out)[:colours, first : first + colours] = sign * torch.eye(colours)
    start_variance(aggregator.conv_out)
    for conv in (model.quant_conv, model.post_quant_conv):
        if isinstance(conv, nn.Conv2d):
            pass_on(conv, conv.out_channels)
            nn.init.zeros_(cast(Tensor, conv.bias))


def res_blocks(module: nn.Module) -> list[ResBlock]:
    return [block for block in module.modules() if isinstance(block, ResBlock)]


def centre(conv: nn.Conv2d) -> Tensor:
    """Returns the weights (out_channels, in_channels) at the middle of a convolution's window."""
    height, width = conv.kernel_size
    return conv.weight[:, :, height // 2, width // 2]


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


def pass_on(conv: nn.Conv2d | None, count: int, first: int = 0) -> None:
    """Makes the first `count` outputs of a convolution, if there is one, equal to its inputs from `first` on."""
    if conv is not None:
        conv.weight[:count] = 0
        centre(conv)[:count, first : first + count] = torch.eye(count)
