"""Blocks that the encoder's U-Nets and the decoder share. Parameters have diffusers' names."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from litevae_kernels.arithmetic import widened
from litevae_kernels.backend import keep_backend
from litevae_kernels.nn import Conv2d, Conv3x3, GroupNormSiLU, Linear, SelfModulatedConv2d

Norm = Literal["group", "smc", "none"]

EPS = 1e-6  # epsilon of every GroupNorm, as in the Stable Diffusion VAE


def autocast_enabled(device: torch.device) -> bool:
    """Returns whether autocast is enabled for `device`; PyTorch has no autocast for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """Returns the dtype in which `module` computes on `device`: autocast's if enabled, else its parameters'.

    Under diffusers' layerwise casting this is the compute dtype, not the storage dtype.
    """
    dtype: torch.dtype = get_parameter_dtype(module)
    if autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device.type)
    return dtype


def norm_silu(channels: int, num_groups: int, norm: Norm) -> nn.Module:
    """Returns the layer before a plain convolution: GroupNorm and SiLU, or SiLU alone without a norm."""
    return GroupNormSiLU(num_groups, channels, eps=EPS) if norm == "group" else nn.SiLU()


class CheckpointedModule(nn.Module):
    """A module whose blocks can be recomputed in backward; see `ModelMixin.enable_gradient_checkpointing`."""

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin

    def run(self, block: nn.Module, *args: Tensor) -> Tensor:
        """Returns `block(*args)`, checkpointed if that and gradients are enabled."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*args)
        # The recomputation runs in the thread of the backward pass, which on a GPU is another one.
        return self._gradient_checkpointing_func(keep_backend(block), *args)


class ShortcutConv2d(Conv2d):
    """A 1x1 convolution of one input, or of two inputs as if they were concatenated."""

    def forward(self, input: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            return super().forward(input)
        return widened(_convolve_both, input, skip, self.weight, self.bias)


def _convolve_both(input: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, weight_skip = weight.tensor_split([input.shape[1]], dim=1)
    # The sum can be in place, because the backward pass of a convolution does not need its result.
    return F.conv2d(input, weight, bias).add_(F.conv2d(skip, weight_skip))


class ResBlock(nn.Module):
    """A residual block with two 3x3 convolutions: x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    A 1x1 convolution is applied to x if the widths differ. `norm="smc"` replaces both pairs of GroupNorm and
    convolution by self-modulated convolutions (Section 4.2), `norm="none"` by plain ones. Takes
    (N, in_channels, H, W), or a U-Net's input and skip that have in_channels together; returns
    (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, norm: Norm = "group") -> None:
        super().__init__()
        conv: Callable[[int, int], nn.Module] = partial(Conv3x3, silu_input=norm == "none")
        if norm == "smc":
            conv = partial(SelfModulatedConv2d, kernel_size=3, padding=1, silu_input=True)
        grouped = norm == "group"
        self.norm1 = norm_silu(in_channels, num_groups, norm) if grouped else nn.Identity()
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm_silu(out_channels, num_groups, norm) if grouped else nn.Identity()
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut = (
            ShortcutConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        inputs = [x] if skip is None else [x, skip]
        if skip is not None and not (
            isinstance(self.norm1, GroupNormSiLU) and self.conv_shortcut is not None
        ):
            inputs = [torch.cat(inputs, dim=1)]  # some layer takes only one input
        h = self.norm2(self.conv1(self.norm1(*inputs)))
        # Computed only now, so that it does not add to peak memory in conv1.
        residual = inputs[0] if self.conv_shortcut is None else self.conv_shortcut(*inputs)
        return self.conv2(h, residual)

    def fold(self) -> None:
        """Replaces self-modulated convolutions by plain ones that have the modulated weights."""
        for name in ("conv1", "conv2"):
            layer = getattr(self, name)
            if isinstance(layer, SelfModulatedConv2d):
                folded = layer.folded()
                plain = Conv3x3(layer.in_channels, layer.out_channels, silu_input=True, device="meta")
                plain.weight, plain.bias = folded.weight, folded.bias
                setattr(self, name, plain.train(layer.training))


class Attention(nn.Module):
    """Single-head self-attention over the pixels of (N, C, H, W), with its GroupNorm and a residual."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])  # named to_out.0, as in diffusers

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (N, 1, HW, C)
        h = widened(F.scaled_dot_product_attention, self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](h).squeeze(1).transpose(1, 2).view_as(x)


class MidBlock(CheckpointedModule):
    """Two ResBlocks with optional attention in between, (N, channels, H, W) -> (N, channels, H, W)."""

    def __init__(self, channels: int, num_groups: int, norm: Norm = "group", *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, num_groups, norm) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.resnets[0], x)
        for attention in self.attentions:
            x = self.run(attention, x)
        return self.run(self.resnets[1], x)
