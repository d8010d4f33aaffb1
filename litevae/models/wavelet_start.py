"""Initial weights with which the latent consists of sub-bands of the image."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from litevae.models.encoder import Encoder
from litevae.models.feature_unet import FeatureUNet
from litevae.models.initialise import convolutions_outside_branches, initialise, start_variance
from litevae.models.interface import Autoencoder

# The signs of each Haar sub-band's filter on a square of 2 x 2 pixels.
HAAR = (((1, 1), (1, 1)), ((1, 1), (-1, -1)), ((1, -1), (1, -1)), ((1, -1), (-1, 1)))
CONSTANT = 4.0  # large beside the signals, which lie in [-1, 1]


@torch.no_grad()
def initialise_as_wavelet(model: Autoencoder) -> None:
    """Initialises `model` in place, so that its latent consists of sub-bands of the image.

    Everything starts as in `initialise`, but the convolutions outside of the residual branches pass the first
    channels on. The posterior's mean is then the first coefficients of the coarsest wavelet level: the local means of
    the colours, then their details. LiteVAE's encoder is given them; that of an `AutoencoderKL` computes them in its
    strided convolutions. The decoder repeats each local mean. It cannot add the details linearly, because a
    convolution does not know at which copy of a repeated value it is.

    A GroupNorm before the last convolution would divide each signal by its own strength. The groups of the signals
    therefore have constants as well, beside which the signals' share of the variance is small.

    Raises:
        ValueError: the model has no such path, because its encoder has neither U-Nets nor strided convolutions; it has
            fewer latent channels than colours; or a layer has too few channels, in total or per group.
    """
    encoder: Any = model.encoder  # ours or diffusers', as is the decoder
    decoder: Any = model.decoder
    colours = cast(int, model.config.in_channels)
    passed = min(len(HAAR) * colours, model.config.latent_channels)
    if passed < colours:
        raise ValueError(f"initialise=wavelet needs {colours} latent channels or more, got {passed}")
    decoded = embed_signals("decoder", main_path(decoder), decoder.conv_norm_out, passed, colours)
    if isinstance(encoder, Encoder):
        unets: list[Any] = [encoder.feature_extractors[-1], encoder.feature_aggregator]
        for unet in unets:
            if not isinstance(unet, FeatureUNet):
                raise ValueError(f"initialise=wavelet needs U-Nets in the encoder, got {type(unet).__name__}")
        check_width("encoder", [conv for unet in unets for conv in main_path(unet)], passed)
        initialise(model)
        # The aggregator's input ends with the coarsest level.
        for unet, first in zip(unets, (0, unets[1].conv_in.in_channels - len(HAAR) * colours), strict=True):
            pass_bands(unet, first, passed)
        start_variance(unets[1].conv_out)
    elif strided := [i for i, conv in enumerate(main_path(encoder)) if conv.stride == (2, 2)]:
        last = strided[-1]
        after = main_path(encoder)[last:]
        encoded = embed_signals(
            "encoder after its last strided convolution", after, encoder.conv_norm_out, passed, passed
        )
        initialise(model)
        compute_bands(encoder, last, colours, encoded)
    else:
        raise ValueError(
            f"initialise=wavelet needs an encoder with U-Nets or strided convolutions, got {type(encoder).__name__}"
        )
    repeat_means(decoder, colours, decoded)
    for conv in (model.quant_conv, model.post_quant_conv):
        if isinstance(conv, nn.Conv2d):
            pass_on(conv, conv.out_channels)
            nn.init.zeros_(cast(Tensor, conv.bias))


def main_path(network: nn.Module) -> list[nn.Conv2d]:
    """Returns the convolutions that a signal must pass before the last one of a network, in this order."""
    return [
        conv
        for conv in convolutions_outside_branches(network)
        if conv is not getattr(network, "conv_out", None)
    ]


def check_width(name: str, convs: list[nn.Conv2d], needed: int) -> None:
    """Raises ValueError unless every convolution has `needed` output channels."""
    width = min(conv.out_channels for conv in convs)
    if width < needed:
        raise ValueError(
            f"initialise=wavelet needs {needed} channels or more in each layer of the {name}, got {width}"
        )


@dataclass
class Embedding:
    """How the first channels of a network take signals past its last norm and SiLU: as weight @ signals + bias.

    Each signal is stored once with each sign, because silu(x) - silu(-x) = x.

    Attributes:
        weight: ones, their negatives and zeros (channels, signals).
        bias: constants (channels,).
        scale: number by which the norm divides the first signals.
    """

    weight: Tensor
    bias: Tensor
    scale: float


def embed_signals(name: str, convs: list[nn.Conv2d], norm: nn.Module, signals: int, exact: int) -> Embedding:
    """Returns how to embed `signals` signals, or as many of them as there are channels for.

    Args:
        name: what errors call the network.
        convs: convolutions that the signals pass.
        norm: last norm of the network, or what is there without one.
        signals: number of signals.
        exact: how many of them the norm must leave as they are, apart from the scale.

    Raises:
        ValueError: there are too few channels for `exact` signals.
    """
    width = min(conv.out_channels for conv in convs)
    if not isinstance(norm, nn.GroupNorm):
        check_width(name, convs, 2 * exact)
        eye = torch.eye(min(signals, width // 2), signals)
        return Embedding(torch.cat([eye, -eye]), torch.zeros(2 * len(eye)), 1.0)
    size = norm.num_channels // norm.num_groups
    room = size // 4  # signals per group: half of it for them, with both signs, half for constants
    if room == 0:
        raise ValueError(
            f"initialise=wavelet needs 4 channels or more per group in the last norm of the {name}, got {size}: "
            "lower model.num_groups"
        )
    groups = math.ceil(exact / room)
    check_width(name, convs, groups * size)
    weight = torch.zeros(groups, size, signals)
    for signal in range(exact):
        group, place = divmod(signal, room)
        weight[group, place, signal] = 1
        weight[group, room + place, signal] = -1
    bias = torch.zeros(groups, size)
    bias[:, 2 * room : 3 * room] = CONSTANT
    bias[:, 3 * room : 4 * room] = -CONSTANT
    more = torch.eye(signals)[exact:].repeat_interleave(2, dim=0)
    more[1::2] *= -1
    more = more[: (width - groups * size) // 2 * 2]
    variance = 2 * room * CONSTANT**2 / size
    return Embedding(
        torch.cat([weight.flatten(0, 1), more]),
        torch.cat([bias.flatten(), torch.zeros(len(more))]),
        (variance + norm.eps) ** 0.5,
    )


def pass_bands(unet: FeatureUNet, first: int, passed: int) -> None:
    """Makes a U-Net of the encoder pass on its `passed` inputs from `first` on."""
    conv_in, *others = main_path(unet)
    pass_on(conv_in, passed, first)
    for conv in (*others, unet.conv_out):
        pass_on(conv, passed)


def compute_bands(encoder: Any, last: int, colours: int, embedding: Embedding) -> None:
    """Makes the SD-VAE's encoder compute sub-bands, whose details come from its convolution number `last`."""
    channels, passed = embedding.weight.shape
    filters = torch.tensor(HAAR) / 4
    # (bands, colours of the input, 2, 2) for each colour of the output, of which the first bands are taken
    bands = torch.einsum("bij,oc->bocij", filters, torch.eye(colours)).flatten(0, 1)[:passed]
    for i, conv in enumerate(main_path(encoder)):
        if i == last:
            conv.weight[:channels] = 0
            conv.weight[:channels, :colours, :2, :2] = torch.einsum("ks,scij->kcij", embedding.weight, bands)
            cast(Tensor, conv.bias)[:channels] = embedding.bias
        elif conv.stride == (2, 2):
            conv.weight[:colours] = 0
            conv.weight[:colours, :colours, :2, :2] = bands[:colours]
        else:
            pass_on(conv, colours if i < last else channels)
    conv_out = encoder.conv_out
    conv_out.weight[:passed] = 0
    centre(conv_out)[:passed, :channels] = embedding.scale * embedding.weight.T
    start_variance(conv_out)


def repeat_means(decoder: Any, colours: int, embedding: Embedding) -> None:
    """Makes the decoder repeat the local means of the colours, and carry the other signals for the branches to use."""
    channels, signals = embedding.weight.shape
    conv_in, *others = main_path(decoder)
    conv_in.weight[:channels] = 0
    centre(conv_in)[:channels, :signals] = embedding.weight
    cast(Tensor, conv_in.bias)[:channels] = embedding.bias
    for conv in others:
        pass_on(conv, channels)
    nn.init.zeros_(decoder.conv_out.weight)
    centre(decoder.conv_out)[:colours, :channels] = embedding.scale * embedding.weight.T[:colours]


def centre(conv: nn.Conv2d) -> Tensor:
    """Returns the weights (out_channels, in_channels) at the middle of a convolution's window."""
    height, width = conv.kernel_size
    return conv.weight[:, :, height // 2, width // 2]


def pass_on(conv: nn.Conv2d, count: int, first: int = 0) -> None:
    """Makes the first `count` outputs of a convolution equal to its inputs from `first` on."""
    conv.weight[:count] = 0
    centre(conv)[:count, first : first + count] = torch.eye(count)
