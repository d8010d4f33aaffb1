"""The 3x3 convolution on a GPU, without gradients: the Triton kernel or PyTorch's operators, whichever is faster.

No GPU has confirmed the kernel, so it is off unless the environment variable ``LITEVAE_GPU_CONV`` is ``measure`` or
``use_backend("triton")`` forces it. With ``measure``, the first call of each shape, dtype and device times both, as
``torch.backends.cudnn.benchmark`` does, and the process keeps the faster one.
"""

import os
import statistics
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import choose, forced_backend, read_mode, triton_installed, why_not
from litevae_kernels.conv3x3 import reference
from litevae_kernels.conv3x3.addition import convolve, empty_statistics
from litevae_kernels.tensors import empty_output, in_layout

DTYPES = (torch.bfloat16, torch.float16)  # cuDNN serves float32
MOST_PIXELS = 2**30  # per image, so that int32 holds an index and what is added to it
MODES = ("off", "measure")
ROUNDS, CALLS = 5, 5  # of a measurement

Call = Callable[[], Tensor]
mode = read_mode("LITEVAE_GPU_CONV", os.environ.get("LITEVAE_GPU_CONV") or None, MODES)

_winners: dict[Hashable, bool] = {}  # whether the kernel is faster, by all that may matter


def serves(dtype: torch.dtype, x: Tensor) -> bool:
    """Returns whether a call with `x` (N, C, H, W) on a GPU, and a result of `dtype`, may run on the kernel."""
    if not _is_on() or torch.is_grad_enabled() or choose("cuda") == "reference":
        return False
    return dtype in DTYPES and x.stride(1) == 1 and x.shape[2] * x.shape[3] <= MOST_PIXELS


def describe(dtype: torch.dtype) -> str:
    """Returns what serves calls on a GPU, for `litevae_kernels.info`."""
    if forced_backend() == "reference" or not _is_on() or dtype not in DTYPES:
        return "PyTorch's convolution"
    which = "triton" if forced_backend() == "triton" else "the faster of triton and PyTorch's convolution"
    return f"{which}, if channels are innermost and gradients off; else PyTorch's convolution"


def _is_on() -> bool:
    forced = forced_backend()
    return triton_installed and (forced == "triton" or (mode == "measure" and forced is None))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """Returns the convolution (N, C_out, H, W) in channels_last; `x` has adjacent channels."""

    def ours() -> Tensor:
        return _convolve(x, None, None, weight, bias, residual, silu_input)

    def theirs() -> Tensor:
        return _convolve_in_pytorch(x, weight, bias, residual, silu_input)

    return _faster(_key("conv", x, weight, bias, residual, silu_input), x, ours, theirs)


def norm_forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Sequence[Tensor] | None = None,
    measured: Tensor | None = None,
) -> Tensor:
    """Returns the convolution of the SiLU of a group normalisation; the channels of `skip` follow those of `x`.

    Args:
        statistics: those of `x` and `skip`, as `group_norm_silu` takes them.
        measured: filled with those of the result, unless it is None.
    """

    def ours() -> Tensor:
        from litevae_kernels.group_norm_silu.triton import coefficients_of

        stats = torch.empty((x.shape[0], num_groups, 2), dtype=torch.float64, device=x.device)
        norm = (norm_weight, norm_bias, stats, num_groups, eps, None)
        affine = coefficients_of(x, skip, *norm, statistics or ())
        return _convolve(x, skip, affine, weight, bias, residual, True, measured)

    def theirs() -> Tensor:
        backend = "native" if why_not("native", x.device.type) is None else "triton"
        norm = (norm_weight, norm_bias, num_groups, eps, backend, None, statistics)
        h = torch.ops.litevae.group_norm_silu(x, skip, *norm)[0]
        return _convolve_in_pytorch(h, weight, bias, residual, False, measured)

    of_skip = None if skip is None else _layout(skip)
    kind = (num_groups, of_skip, bool(statistics), measured is None)
    return _faster(_key("norm", x, weight, bias, residual, *kind), x, ours, theirs)


def measured_norm_forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Sequence[Tensor] | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """Returns what `norm_forward` does, and the statistics of it or, unless `measure`, no number."""
    measured = empty_statistics(x, weight.shape[0], measure)
    norm = (num_groups, norm_weight, norm_bias, eps)
    y = norm_forward(x, skip, *norm, weight, bias, residual, statistics, measured if measure else None)
    return y, measured


def _key(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *others: Hashable
) -> Hashable:
    layout = (x.dtype, *_layout(x), weight.dtype, weight.shape, weight.stride())
    return (name, x.device, *layout, bias is None, residual is None, *others)


def _layout(x: Tensor) -> tuple[Hashable, ...]:
    return x.shape, x.stride(), x.data_ptr() % 16


def _convolve(
    x: Tensor,
    skip: Tensor | None,
    affine: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_input: bool,
    measured: Tensor | None = None,
) -> Tensor:
    from litevae_kernels.conv3x3 import triton  # some platforms have no Triton
    from litevae_kernels.group_norm_silu.triton import channel_statistics

    y = empty_output(x, weight.shape[0], True)
    if y.numel():
        skip = None if skip is None else in_layout(skip, True)
        residual = None if residual is None else in_layout(residual.to(x.dtype), True)
        filters = weight.to(x.dtype).permute(0, 2, 3, 1).contiguous()
        partials = None if measured is None else triton.empty_partials(y)
        triton.forward(x, skip, affine, filters, bias, residual, silu_input, y, partials)
        if partials is not None and measured is not None:
            channel_statistics(partials, measured, y.shape[2] * y.shape[3], triton.TILE_P)
    return y


def _convolve_in_pytorch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_input: bool,
    measured: Tensor | None = None,
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    # Autocast, which may be on, has had its effect.
    with torch.autocast(x.device.type, enabled=False):
        if measured is None:
            y = convolve(x, weight.to(x.dtype), bias, residual, silu_input)
            return y.contiguous(memory_format=torch.channels_last)
        y = reference.forward(x, weight.to(x.dtype), None, None, silu_input)
    y = y.contiguous(memory_format=torch.channels_last)
    if y.numel():
        from litevae_kernels.group_norm_silu import triton

        biases, residuals = ([t for t in (term,) if t is not None] for term in (bias, residual))
        triton.add(y, residuals, biases, measured)
    return y


def _faster(key: Hashable, x: Tensor, ours: Call, theirs: Call) -> Tensor:
    # A compiled graph in which the kernel was forced may run when nothing is forced any more.
    if mode != "measure" or forced_backend() == "triton":
        return ours()
    wins = _winners.get(key)
    if wins is None:
        with torch.cuda.device_of(x):  # The clock is that of the current device.
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return theirs()  # Nothing can be timed now; a later call may.
            wins = _winners[key] = measure(ours, theirs)
    return ours() if wins else theirs()


def measure(ours: Call, theirs: Call) -> bool:
    """Returns whether `ours` takes less time than `theirs`; False, with a warning, if it fails."""
    times: tuple[list[float], list[float]] = [], []
    theirs()  # The first calls compile and choose algorithms.
    try:
        ours()
        for _ in range(ROUNDS):
            for call, taken in zip((ours, theirs), times, strict=True):
                taken.append(_time(call))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"PyTorch serves a 3x3 convolution because the Triton kernel failed: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return statistics.median(times[0]) < statistics.median(times[1])


def _time(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
