"""GroupNorm+SiLU in the compiled core: C++ on the CPU, CUDA C++ on a GPU.

The functions fill tensors that the caller allocated, and take any strides. On the CPU, a tensor is copied first if its
innermost dimension is not that of the output, or has gaps.

On sm_90 and newer GPUs, one kernel can serve a forward pass in thread-block clusters, which read their input once. No
GPU has confirmed that it is faster, so it is off unless the environment variable ``LITEVAE_GPU_NORM`` is ``clusters``.
"""

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import core, read_mode
from litevae_kernels.tensors import (
    current_stream,
    device_guard,
    is_channels_last,
    memory_format_of,
    native_view,
    scratch_memory,
)

MODES = ("off", "clusters")
mode = read_mode("LITEVAE_GPU_NORM", os.environ.get("LITEVAE_GPU_NORM") or None, MODES)


@functools.cache
def why_no_clusters(device: int) -> str | None:
    """Returns why clusters serve no call on a GPU; None if they serve those whose images fit."""
    if core is None or not hasattr(core, "group_norm_silu_card"):
        return "the core was not built for a GPU of sm_90 or newer"
    with device_guard(torch.device("cuda", device)):  # The core makes that GPU the current one.
        _multiprocessors, _shared_bytes, blocks = core.group_norm_silu_card(device)
    return None if blocks else f"GPU {device} has no thread-block clusters, or the core was not built for it"


@functools.cache
def _may_use_clusters(device: int) -> bool:
    reason = why_no_clusters(device)
    if reason is not None:
        warnings.warn(f"LITEVAE_GPU_NORM=clusters has no effect: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def describe_clusters() -> str:
    """Returns whether clusters serve calls on a GPU, for `litevae_kernels.info`."""
    if mode != "clusters":
        return "off"
    found = [why_no_clusters(device) for device in range(torch.cuda.device_count())]
    return ", ".join(reason or f"on for GPU {i}" for i, reason in enumerate(found)) or "no GPU is visible"


def _gapless(x: Tensor, like: Tensor) -> Tensor:
    """Returns `x` or a copy of it, with adjacent elements in the innermost dimension of the dense tensor `like`."""
    channels_last = is_channels_last(like)
    innermost = 1 if channels_last else 3 if x.shape[3] > 1 else 2
    if x.shape[innermost] == 1 or x.stride(innermost) == 1:
        return x
    return x.contiguous(memory_format=memory_format_of(channels_last))


def forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    num_groups: int,
    eps: float,
    offset: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> None:
    """Fills `y` (N, C, H, W) and, unless it is None, `stats` (N, num_groups, 2).

    A GPU takes the mean and variance of each channel of x and of skip from `statistics`, if there are any; a CPU makes
    its own.
    """
    assert core is not None
    on_cpu = x.device.type == "cpu"
    if on_cpu:
        x, skip = _gapless(x, y), None if skip is None else _gapless(skip, y)
    views = [native_view(t) for t in (x, skip, weight, bias, offset, y)]
    if on_cpu:
        address = 0 if stats is None else stats.data_ptr()  # the core has its own memory for statistics
        core.group_norm_silu_cpu(*views, address, num_groups, eps, torch.get_num_threads())
        return
    with device_guard(x.device):
        size = core.group_norm_silu_scratch_bytes(views[-1])
        # Two allocations would take the host longer than one.
        own = 16 * x.shape[0] * num_groups if stats is None else 0
        scratch = scratch_memory(own + size, x.device)
        first = scratch.data_ptr()
        address = first if stats is None else stats.data_ptr()
        stream = current_stream(x.device)
        given = (*(t.data_ptr() for t in statistics), 0, 0)[:2]
        # With statistics, the other kernels read x once as well.
        clusters = mode == "clusters" and not statistics and _may_use_clusters(x.device.index)
        core.group_norm_silu_cuda(
            *views, address, num_groups, eps, *given, first + own, x.device.index, stream, clusters
        )


def add(y: Tensor, residuals: Sequence[Tensor], biases: Sequence[Tensor], statistics: Tensor | None) -> None:
    """Adds to `y` on a GPU, and fills `statistics` (N, C, 2) with the mean and variance of each channel of the sum."""
    assert core is not None
    with device_guard(y.device):
        to, stats = native_view(y), 0 if statistics is None else statistics.data_ptr()
        scratch = scratch_memory(core.group_norm_silu_scratch_bytes(to) if stats else 0, y.device)
        core.add_residuals_cuda(
            to,
            [native_view(t) for t in residuals],
            [native_view(t) for t in biases],
            stats,
            scratch.data_ptr(),
            y.device.index,
            current_stream(y.device),
        )


def statistics(x: Tensor, skip: Tensor | None, stats: Tensor, num_groups: int, eps: float) -> None:
    """Fills `stats` (N, num_groups, 2) on the CPU, without computing a result."""
    assert core is not None
    x, skip = _gapless(x, x), None if skip is None else _gapless(skip, x)
    views = [native_view(t) for t in (x, skip)]
    core.group_norm_silu_cpu(
        *views, None, None, None, None, stats.data_ptr(), num_groups, eps, torch.get_num_threads()
    )


def backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    grad_x: Tensor,
    grad_skip: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    num_groups: int,
) -> None:
    """Fills the gradients that are not None."""
    assert core is not None
    on_cpu = x.device.type == "cpu"
    to_skip = grad_skip
    if on_cpu:
        grad, x = _gapless(grad, grad_x), _gapless(x, grad_x)
        skip = None if skip is None else _gapless(skip, grad_x)
        to_skip = None if grad_skip is None else _gapless(grad_skip, grad_x)
    inputs = [native_view(t) for t in (grad, x, skip, weight, bias)]
    outputs = [native_view(t) for t in (grad_x, to_skip, grad_weight, grad_bias)]
    if on_cpu:
        core.group_norm_silu_backward_cpu(
            *inputs, stats.data_ptr(), *outputs, num_groups, torch.get_num_threads()
        )
        if grad_skip is not None and to_skip is not None and to_skip is not grad_skip:
            grad_skip.copy_(to_skip)
        return
    with device_guard(x.device):
        scratch = scratch_memory(core.group_norm_silu_scratch_bytes(inputs[0]), x.device)
        stream = current_stream(x.device)
        core.group_norm_silu_backward_cuda(
            *inputs, stats.data_ptr(), *outputs, num_groups, scratch.data_ptr(), x.device.index, stream
        )
