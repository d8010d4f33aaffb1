"""The 3x3 convolution of the SiLU of a group normalisation, without a normalised tensor in memory, and the reverse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.arithmetic import result_dtype
from litevae_kernels.conv3x3 import check_arguments, conv3x3, is_fused
from litevae_kernels.group_norm_silu import check_arguments as check_norm
from litevae_kernels.group_norm_silu import check_statistics, group_norm_silu
from litevae_kernels.tensors import refuse_tangents


def norm_silu_conv3x3(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Returns ``conv3x3(group_norm_silu(x, num_groups, ...), weight, bias, residual=residual)``.

    While no gradients are recorded, the kernels for the CPU compute the statistics in one pass over the input, and
    normalise and activate it while they read it. All other calls run the two operators.

    Args:
        x, num_groups, eps, skip: arguments of `group_norm_silu`; `x` is (N, C, H, W) and `skip` (N, C_skip, H, W).
        norm_weight, norm_bias: its scale and its offset, (C + C_skip).
        weight, bias, residual: arguments of `conv3x3`; `weight` is (C_out, C + C_skip, 3, 3).

    Returns:
        (N, C_out, H, W) in x's dtype, or under autocast in that of autocast.

    Raises:
        TypeError, ValueError, NotImplementedError: as the two operators do.
    """
    if not normalises(x, weight):
        h = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps=eps, skip=skip)
        return conv3x3(h, weight, bias, residual=residual)
    num_groups, eps = check_norm(x, num_groups, norm_weight, norm_bias, eps, skip)
    check_arguments(x, weight, bias, residual, skip)
    refuse_tangents("norm_silu_conv3x3", "native", x, skip, norm_weight, norm_bias, weight, bias, residual)
    return torch.ops.litevae.norm_silu_conv3x3(
        x, skip, num_groups, norm_weight, norm_bias, eps, weight, bias, residual
    )


def measured_norm_silu_conv3x3(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
    measure: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Returns what `norm_silu_conv3x3` does and, if `measure`, its statistics, where `measures` is true.

    Args:
        statistics: those of `x` and `skip`, as `group_norm_silu` takes them.
        measure: whether the convolution also computes the statistics of its result for the norm that reads it.

    Raises:
        TypeError, ValueError: as the two operators do.
    """
    num_groups, eps = check_norm(x, num_groups, norm_weight, norm_bias, eps, skip)
    check_arguments(x, weight, bias, residual, skip)
    check_statistics(statistics, x, skip)
    refuse_tangents("norm_silu_conv3x3", "triton", x, skip, norm_weight, norm_bias, weight, bias, residual)
    norm = (num_groups, norm_weight, norm_bias, eps)
    y, found = torch.ops.litevae.measured_norm_silu_conv3x3(
        x, skip, *norm, weight, bias, residual, statistics, measure
    )
    return y, found if measure else None


def measures(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `measured_norm_silu_conv3x3` serves `x` (N, C, H, W) and `weight`."""
    return normalises(x, weight) and x.is_cuda


def normalises(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels normalise `x` (N, C, H, W) while they convolve it with `weight`."""
    # The operators themselves refuse what is not a dense tensor.
    if torch.is_grad_enabled() or not all(
        isinstance(t, Tensor) and t.layout == torch.strided and t.ndim == 4 for t in (x, weight)
    ):
        return False
    return x.dtype == result_dtype(x) and is_fused(x, weight)


def norm_adds_bias(x: Tensor) -> bool:
    """Returns whether the norm after a convolution of `x` should add the bias of the convolution, as its `offset`.

    On a GPU, PyTorch adds the bias in a pass of its own, and a norm that adds it is free.
    """
    return x.is_cuda and not torch.is_grad_enabled()
