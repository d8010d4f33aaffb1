"""The convolution in plain PyTorch. Differentiable by autograd as it stands."""

import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.tensors import add_residual


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """(N, C_in, H, W) to (N, C_out, H, W)."""
    y = F.conv2d(F.silu(x) if silu_input else x, weight, bias, padding=1)
    return y if residual is None else add_residual(y, residual)
