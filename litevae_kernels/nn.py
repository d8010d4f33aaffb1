"""Thin modules over the operators. Their state-dict keys are those of the plain PyTorch layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.GroupNorm):
    """SiLU of a group normalisation; a drop-in for `nn.GroupNorm` followed by `nn.SiLU`.

    Takes and returns (N, C, *). Constructor arguments and state-dict keys are `nn.GroupNorm`'s.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class SelfModulatedConv2d(nn.Conv2d):
    """Self-modulated convolution (LiteVAE, Equation 3): a convolution that normalises its own weights.

    w'[o,i,k] = gain * scale[i] * w[o,i,k] / (sqrt(sum_{i,k} (scale[i] * w[o,i,k])^2) + eps)

    The scales and the gain belong to the layer, not to the sample, so this is one ordinary convolution.
    Takes (N, C_in, H, W), returns (N, C_out, H', W'). Constructor arguments are `nn.Conv2d`'s plus `eps`;
    the state dict has `nn.Conv2d`'s keys plus `scale` (C_in) and `gain` (1), both initially ones.
    The weights are normalised in float32 (float64 for float64), whatever their storage type. An all-zero
    filter gives zeros; its gradient is finite in float32, where the slope is 1 / eps.
    """

    def __init__(self, in_channels: int, out_channels: int, *args: Any, eps: float = 1e-8, **kwargs: Any):
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(in_channels, device=self.weight.device, dtype=self.weight.dtype))
        self.gain = nn.Parameter(torch.ones(1, device=self.weight.device, dtype=self.weight.dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):  # not yet, when nn.Conv2d's constructor calls this
            nn.init.ones_(self.scale)
            nn.init.ones_(self.gain)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"

    def modulated_weight(self) -> Tensor:
        """w' of Equation 3: the shape and dtype of `weight`."""
        # squares of small half-precision weights underflow, and their reciprocals overflow
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        out_per_group = self.out_channels // self.groups
        # (C_in) -> (C_out, C_in / groups, 1, 1): a filter sees the input channels of its group only
        scale = self.scale.to(dtype).view(self.groups, -1).repeat_interleave(out_per_group, dim=0)
        weight = self.weight.to(dtype) * scale[:, :, None, None]
        # vector_norm has subgradient zero at zero, where the derivative of sqrt is infinite
        norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        return (weight * (self.gain.to(dtype) / (norm + self.eps))).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.modulated_weight(), self.bias)
