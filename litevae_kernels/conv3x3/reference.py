"""The direct convolution in plain PyTorch: the oracle, and the fallback. Autograd differentiates it as it stands."""

import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.arithmetic import result_dtype, widened
from litevae_kernels.tensors import add_residual


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """Returns the convolution (N, C_out, H, W) of `x` (N, C_in, H, W)."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = F.conv2d(F.silu(x) if silu_input else x, weight, bias, padding=1)
        return y if residual is None else add_residual(y, residual)

    if residual is not None:
        residual = residual.to(result_dtype(x))
    return widened(convolve, x, weight, bias, residual)
