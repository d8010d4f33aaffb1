"""The weights that training from scratch starts with."""

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

INITIAL_LOGVAR = -4.0


@torch.no_grad()
def initialise(model: Autoencoder) -> None:
    """Initialises `model` in place, so that LiteVAE's encoder is linear and preserves the signal's scale.

    PyTorch's default initialisation shrinks the signal in each convolution outside the residual branches and
    adds normalised branches, which ignore brightness and colour, at full strength: for hundreds of steps the
    latent is noise and the reconstruction brown. Here the branches start at zero, as in ADM
    (Dhariwal & Nichol, 2021), whose U-Nets the encoder follows; the other convolutions preserve the variance;
    and the posterior's standard deviation starts at exp(-2) instead of 1. The baselines are initialised in the
    same way.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResBlock | ResnetBlock2D):
            conv = cast(nn.Conv2d, module.conv2)
            nn.init.zeros_(conv.gain if isinstance(conv, SelfModulatedConv2d) else conv.weight)
        elif isinstance(module, Attention | DiffusersAttention):
            nn.init.zeros_(cast(nn.Linear, module.to_out[0]).weight)
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
    last = model.encoder.feature_aggregator if isinstance(model.encoder, Encoder) else model.encoder
    moments = model.quant_conv or last.conv_out
    logvar = slice(moments.out_channels // 2, None)
    moments.weight[logvar] *= 0.1
    if moments.bias is not None:
        moments.bias[logvar] = INITIAL_LOGVAR
