import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae import LiteVAE
from litevae.models import feature_unet, nafnet, vit
from litevae.models.layers import ResBlock
from litevae.models.nafnet import NAFBlock
from litevae_kernels.nn import GroupNormSiLU, SelfModulatedConv2d


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Uses one thread: tiny layers gain nothing from several, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """Returns constructor arguments of a LiteVAE that runs in milliseconds."""
    return {
        "extractor_channels": 8,
        "extractor_multipliers": (1, 2),
        "aggregator_channels": 8,
        "aggregator_multipliers": (1, 3),
        "encoder_num_groups": 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "num_groups": 4,
    }


@pytest.fixture
def unfused() -> Callable[[nn.Module], nn.Module]:
    """Returns a function that copies a model with PyTorch's own operators in its ResBlocks and norms."""

    def unfuse(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, ResBlock):
                module.forward = partial(res_block, module)
            elif isinstance(module, GroupNormSiLU):
                module.forward = partial(norm_silu, module)
        return model

    return unfuse


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.GroupNorm):
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(x)


def res_block(block: ResBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        weight = equation_3(conv) if hasattr(conv, "scale") else conv.weight
        h = F.conv2d(norm_silu(norm, h), weight, conv.bias, padding=1)
    shortcut = block.conv_shortcut
    return (x if shortcut is None else F.conv2d(x, shortcut.weight, shortcut.bias)) + h


def equation_3(conv: nn.Module) -> Tensor:
    """Returns the self-modulated weight, computed in float64 and rounded to the weight's dtype."""
    weight = conv.weight.double() * conv.scale.double()[:, None, None]
    norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return (conv.gain.double() * weight / (norm + conv.eps)).to(conv.weight.dtype)


@pytest.fixture
def make(tiny_config):
    """Returns a function that makes a tiny LiteVAE, always with the same weights."""

    def make(**options) -> LiteVAE:
        torch.manual_seed(0)
        return LiteVAE(**{**tiny_config, **options})

    return make


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def latent() -> Tensor:
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def square_image() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Returns a function that draws all parameters at random: zeros would hide the layers before them."""
    return randomise


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 0.3)
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(layer.weight, mean=1, std=0.2)
        elif isinstance(layer, SelfModulatedConv2d):
            nn.init.uniform_(layer.scale, 0.5, 2)
            nn.init.uniform_(layer.gain, 0.5, 1)
        elif isinstance(layer, NAFBlock):
            nn.init.uniform_(layer.beta, 0.2, 0.5)
            nn.init.uniform_(layer.gamma, 0.2, 0.5)
            nn.init.ones_(layer.attention.bias)
    return module


@pytest.fixture
def make_variant(tiny_config, monkeypatch):
    """Returns a function that makes a LiteVAE with few layers, always with the same random weights."""
    monkeypatch.setattr(feature_unet, "RES_BLOCKS", 1)
    monkeypatch.setattr(nafnet, "BLOCKS", 2)
    monkeypatch.setattr(vit, "BLOCKS", 2)

    def make(**options) -> LiteVAE:
        torch.manual_seed(0)
        few = {"extractor_multipliers": (1,), "aggregator_multipliers": (1,)}
        return randomise(LiteVAE(**{**tiny_config, **few, **options}))

    return make
