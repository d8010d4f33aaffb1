"""Half precision on CPUs that lack its arithmetic: widen to float32, compute, and round once.

On such CPUs, PyTorch's own bfloat16 and float16 convolutions and matrix products emulate the arithmetic, many times
more slowly than float32.
"""

import platform
from collections.abc import Callable

import torch
from torch import Tensor

from litevae_kernels.backend import core, is_exporting
from litevae_kernels.tensors import device_type_of

_HALVES = (torch.bfloat16, torch.float16)
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ONEDNN = torch.backends.mkldnn.is_available()
_BFLOAT16 = (
    torch.cpu._is_avx512_bf16_supported()
    if _X86
    else _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
_FLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@torch.compiler.assume_constant_result
def current_isa() -> str | None:
    """Returns the instruction set that the core uses; None without a core."""
    return None if core is None else core.isa()


def multiplies(dtype: torch.dtype, isa: str | None) -> bool:
    """Returns whether the CPU multiplies numbers of `dtype`.

    Args:
        dtype: any floating-point dtype.
        isa: instruction set, as `current_isa` returns it. A set below AVX512-BF16 stands for a CPU without half
            precision, whatever this CPU has.
    """
    if dtype not in _HALVES:
        return True
    if _X86 and isa not in (None, "avx512bf16"):
        return False
    return _BFLOAT16 if dtype == torch.bfloat16 else _FLOAT16


def result_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of a convolution of `x`: that of autocast if it is enabled, else x's."""
    # Autocast does not convert float64, and the query raises an error for "meta".
    dtype = x.dtype
    device_type = device_type_of(x)
    if dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def widened(function: Callable[..., Tensor], x: Tensor, *operands: Tensor | None) -> Tensor:
    """Returns ``function(x, *operands)``, in float32 and rounded once if the CPU does not multiply x's dtype.

    Under autocast, its dtype takes the place of x's.

    Args:
        function: plain PyTorch whose result has the dtype of its arguments.
        x, operands: arguments of `function`.
    """
    if not x.is_cpu or (x.dtype not in _HALVES and not torch.is_autocast_enabled("cpu")):
        return function(x, *operands)
    dtype = result_dtype(x)
    if multiplies(dtype, current_isa()) or is_exporting():
        return function(x, *operands)
    autocast = torch.is_autocast_enabled("cpu")
    tensors = [x, *operands]
    if any(
        t is not None and t.dtype != dtype and (not autocast or t.dtype == torch.float64) for t in tensors
    ):
        return function(x, *operands)  # which raises an error
    wide = [None if t is None else t.float() for t in tensors]
    if not autocast:
        return function(*wide).to(dtype)
    with torch.autocast("cpu", enabled=False):
        return function(*wide).to(dtype)
