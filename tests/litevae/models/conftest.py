import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.layers import ResBlock
from litevae_kernels.nn import GroupNormSiLU


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny layers gain nothing from threads, and wait long for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """Constructor arguments of a LiteVAE that runs in milliseconds."""
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
    """A copy of a model whose ResBlocks and norms are PyTorch's own operators, one after the other."""

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
    """The self-modulated weight in float64, rounded to the weight's dtype."""
    weight = conv.weight.double() * conv.scale.double()[:, None, None]
    norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return (conv.gain.double() * weight / (norm + conv.eps)).to(conv.weight.dtype)
