"""Group normalisation followed by SiLU, in one operator.

The result is y = z * sigmoid(z) with z = (x - mean) / sqrt(var + eps) * weight + bias, where the mean and the (biased)
variance are those of each group's channels and pixels. This equals `torch.nn.functional.group_norm` followed by
`torch.nn.functional.silu`, which precede every convolution of the Stable Diffusion VAE and of LiteVAE's U-Nets (paper
Appendix G, ResBlock).

The operator takes float64, float32, bfloat16 and float16. It computes in float32 (float64 for float64), and its
statistics are accurate at any mean. The result keeps the input's dtype, under autocast too, and its memory format. All
orders of derivatives exist. The transforms of `torch.func` run on the reference backend. Forward-mode derivatives
outside of them need ``use_backend("reference")``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import choose
from litevae_kernels.group_norm_silu import op, reference
from litevae_kernels.tensors import (
    check_device,
    check_eps,
    check_flag,
    check_tensor,
    device_type_of,
    is_integer,
    refuse_tangents,
    shape_of,
    shown,
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    skip: Tensor | None = None,
    overwrite: bool = False,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """Returns the SiLU of the group normalisation of `x`, or of `x` and `skip` concatenated along the channels.

    Args:
        x: input (N, C, *) with any strides; channels_last is the fastest.
        num_groups: number of groups, a divisor of the number of channels.
        weight: scale (C), any supported dtype; default: ones.
        bias: offset (C), any supported dtype; default: zeros.
        eps: positive number added to the variance.
        skip: second input (N, C_skip, *), same dtype as `x`. Its channels follow those of `x`, as in
            ``torch.cat([x, skip], 1)`` but without the copy. `weight` and `bias` then are (C + C_skip).
        offset: number per channel (C), or (C + C_skip), any supported dtype, that is added to the input before the
            norm, such as the bias of the convolution that made the input; default: zeros. While gradients are off,
            the kernels add it in float32 (float64 for float64), without a pass of its own; otherwise it is added
            in x's dtype.
        statistics: mean and (biased) variance over the pixels of each channel of `x`, and of `skip` if there is one:
            float64 (N, C, 2) and (N, C_skip, 2), without `offset`. While gradients are off, the kernels for a GPU use
            them in place of a pass over the input; all other calls compute their own. Default: none.
        overwrite: whether the result may take the memory of `x`, whose values the caller no longer needs. The kernel
            for the CPU does so in eager mode while gradients are off, if `x` is dense, and `skip` and `offset` are
            missing; all other calls ignore the permission.

    Returns:
        result (N, C, *), or (N, C + C_skip, *), with the dtype and memory format of `x`.

    Raises:
        TypeError: if a tensor is not float32, float64, float16 or bfloat16, `skip` and `x` differ in dtype,
            `statistics` is not a list or tuple or has a tensor that is not float64, `num_groups` or `eps` is not a
            number, or `overwrite` is not a bool.
        ValueError: if `x` has fewer than 2 dimensions, `num_groups` does not divide the channels, `weight`, `bias` or
            `offset` has another length, `skip` has another size, `statistics` have another number, shape or layout,
            `eps` is not positive or exceeds float32, or the tensors are on several devices.
        NotImplementedError: a tensor has a forward-mode tangent, and the backend is not the reference.
    """
    num_groups, eps = check_arguments(x, num_groups, weight, bias, eps, skip, offset)
    check_flag(overwrite, "overwrite")
    check_statistics(statistics, x, skip)
    backend = choose(device_type_of(x))
    arguments = (_as_4d(x), None if skip is None else _as_4d(skip), weight, bias, num_groups, eps)
    if backend == "reference":
        y = reference.forward(*arguments, offset)
    elif (
        overwrite
        and backend == "native"
        and skip is None
        and offset is None
        and op.can_overwrite(arguments[0], weight, bias)
    ):
        y = op.group_norm_silu_(arguments[0], weight, bias, num_groups, eps)
    else:
        refuse_tangents("group_norm_silu", backend, x, skip, weight, bias, offset)
        y = op.group_norm_silu(*arguments, backend, offset, statistics)
    return y if x.ndim == 4 else y.reshape(x.shape[0], y.shape[1], *x.shape[2:])


def check_arguments(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    skip: Tensor | None,
    offset: Tensor | None = None,
) -> tuple[int, float]:
    """Returns `num_groups` and `eps` as Python's numbers; raises the errors of `group_norm_silu`."""
    check_tensor(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has {x.ndim} dimensions; at least 2 are needed: (batch, channels, ...)")
    channels = x.shape[1]
    if skip is not None:
        check_tensor(skip, "skip")
        if skip.dtype != x.dtype:
            raise TypeError(f"skip has dtype {skip.dtype}; allowed: x's, {x.dtype}")
        if skip.ndim != x.ndim or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"skip has shape {shape_of(skip)}; all but the channels must be as in x, {shape_of(x)}"
            )
        channels += skip.shape[1]
    if not is_integer(num_groups):
        raise TypeError(f"num_groups is {shown(num_groups)}; an integer is needed")
    if num_groups < 1 or channels == 0 or channels % num_groups:
        raise ValueError(f"num_groups is {shown(num_groups)}; it must divide the {channels} channels")
    eps = check_eps(eps)
    for name, parameter in (("weight", weight), ("bias", bias), ("offset", offset)):
        if parameter is not None:
            check_tensor(parameter, name)
            if parameter.shape != (channels,):
                raise ValueError(f"{name} has shape {shape_of(parameter)}; ({channels},) is needed")
    for name, other in (("skip", skip), ("weight", weight), ("bias", bias), ("offset", offset)):
        if other is not None:
            check_device(other, name, x, "x")
    return int(num_groups), eps


def check_statistics(statistics: Sequence[Tensor], x: Tensor, skip: Tensor | None) -> None:
    """Raises the errors of `group_norm_silu` for its statistics."""
    if not isinstance(statistics, list | tuple):
        raise TypeError(f"statistics is a {type(statistics).__name__}; a list or tuple of tensors is needed")
    if not statistics:
        return
    inputs = [x] if skip is None else [x, skip]
    if len(statistics) != len(inputs):
        raise ValueError(f"statistics has {len(statistics)} tensors; {len(inputs)} are needed, one per input")
    for given, of in zip(statistics, inputs, strict=True):
        check_tensor(given, "statistics")
        if given.dtype != torch.float64:
            raise TypeError(f"statistics has dtype {given.dtype}; torch.float64 is needed")
        if given.shape != (*of.shape[:2], 2) or not given.is_contiguous():
            raise ValueError(
                f"statistics has shape {shape_of(given)} and strides {given.stride()}; a contiguous "
                f"{(*of.shape[:2], 2)} is needed"
            )
        check_device(given, "statistics", x, "x")


def _as_4d(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if x.ndim > 4:  # any pixel axes will do, and (D, H) merge without a copy even in channels_last_3d
        return x.flatten(2, -2)
    return x[:, :, None, None] if x.ndim == 2 else x[:, :, None]
