"""The convolution in the compiled core: C++ for the CPU."""

import torch
from torch import Tensor

from litevae_kernels.backend import core
from litevae_kernels.tensors import native_view


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool, y: Tensor
) -> None:
    """Fills `y`; it, `x` and `residual` have one dtype and adjacent channels or pixels."""
    assert core is not None
    views = [native_view(t) for t in (weight, bias, residual, y)]
    core.conv3x3_cpu(native_view(x), silu_input, *views, torch.get_num_threads())


def norm_forward(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Fills `y` with the convolution of the SiLU of a group normalisation, whose statistics are `stats`.

    `y`, `x`, `skip` and `residual` have one dtype and adjacent channels or pixels.
    """
    assert core is not None
    norm = [native_view(t) for t in (x, skip, norm_weight, norm_bias)]
    views = [native_view(t) for t in (weight, bias, residual, y)]
    core.norm_silu_conv3x3_cpu(*norm, stats.data_ptr(), stats.shape[1], *views, torch.get_num_threads())


def input_gradient(grad: Tensor, weight: Tensor, grad_x: Tensor) -> None:
    """Fills `grad_x`; it and `grad` have one dtype and adjacent channels or pixels."""
    assert core is not None
    views = [native_view(t) for t in (grad, weight, grad_x)]
    core.conv3x3_input_gradient_cpu(*views, torch.get_num_threads())


def weight_gradient(x: Tensor, grad: Tensor, grad_weight: Tensor) -> None:
    """Fills `grad_weight`; all three have any dtype and strides."""
    assert core is not None
    views = [native_view(t) for t in (x, grad, grad_weight)]
    core.conv3x3_weight_gradient_cpu(*views, torch.get_num_threads())
