"""The direct convolution in plain PyTorch: the oracle, and the fallback. Autograd differentiates it as it stands."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from litevae_kernels.arithmetic import result_dtype, widened
from litevae_kernels.tensors import add_residual


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """Returns the convolution (N, C_out, H, W) of `x` (N, C_in, H, W)."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = F.conv2d(F.silu(x) if silu_input else x, weight, bias, padding=1)
        return y if residual is None else add_residual(y, residual)

    if residual is not None and residual.dtype != (dtype := result_dtype(x)):
        residual = residual.to(dtype)
    return widened(convolve, x, weight, bias, residual)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of the input (N, C_in, H, W), without derivatives."""
    return widened(lambda grad, weight: F.conv_transpose2d(grad, weight, padding=1), grad, weight)


def weight_gradient(x: Tensor, grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the gradient of the weight of `shape`, (C_out, C_in, 3, 3), in x's dtype and without derivatives."""
    return widened(lambda x, grad: conv2d_weight(x, shape, grad, padding=1), x, grad)
