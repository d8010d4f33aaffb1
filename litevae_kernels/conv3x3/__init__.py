"""The 3x3 convolution of ResBlocks, which also applies SiLU to its input and adds the residual.

The stride is 1 and the padding one pixel of zeros. Kernels of the compiled core serve the CPU, for the result and for
both gradients, by Winograd's minimal filtering (Lavin and Gray 2016):

- float32, and bfloat16 and float16 on CPUs without their arithmetic: F(4x4, 3x3) with 36 multiplications where a
  direct convolution needs 144, or F(2x2, 3x3) with 16 instead of 36 in images whose tiles would be mostly padding.
  Half precision is widened when it is loaded, everything between is float32, and the result is rounded once.
- bfloat16 with channels innermost in memory on a CPU with AVX512-BF16 (and without AMX, which PyTorch's own
  convolution uses): F(2x2, 3x3) in bfloat16. Both transformed factors are rounded, in addition to the result, which
  makes the error about 2.5 times that of a direct bfloat16 convolution.

ERRORS
Sums of a tile's values must not overflow, and a NaN or an infinity spreads to every tile of results that depends on
it. Derivatives of higher order are computed by PyTorch. Forward-mode derivatives and the transforms of `torch.func`
are not supported.

PyTorch's direct convolution serves all other calls: other devices, float64, narrow layers, small images,
`torch.export`, and every call under ``use_backend("reference")``, which is the way to an exact direct convolution. On
a CPU without the arithmetic of a half precision, it computes in float32 and rounds once. There is no Triton kernel:
if Triton is forced and does not serve the CPU, a call that the kernels would have served raises an error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.arithmetic import current_isa, multiplies, result_dtype
from litevae_kernels.backend import choose, core, core_error, forced_backend
from litevae_kernels.conv3x3 import op, reference
from litevae_kernels.tensors import check_residual, check_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# PyTorch's convolution is faster below either limit: the kernels pad the channels to whole vectors, and transform all
# weights whatever the size of the image. The limit is per image, not per batch, so that an image's result does not
# depend on the other images of the batch.
LEAST_CHANNELS = 16
LEAST_PIXELS = 64
LEAST_CHANNELS_BFLOAT16 = 32  # of the kernels that multiply in bfloat16
LEAST_PIXELS_BFLOAT16 = 128


def why_not(dtype: torch.dtype, isa: str | None) -> str | None:
    """Returns why the kernels serve no call of a dtype on the CPU; None if they serve some.

    Args:
        dtype: dtype of the result.
        isa: instruction set, as `current_isa` returns it.
    """
    if core is None:
        return f"the compiled core did not load ({core_error})"
    if dtype not in DTYPES:
        return "the kernels compute in float32"
    if dtype == torch.float32 or not multiplies(dtype, isa):
        return None
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16 or isa != "avx512bf16":
        return f"this CPU has {name} arithmetic, which only PyTorch's convolution uses"
    return "PyTorch's convolution is faster on this CPU, which has AMX" if core.has_amx_bf16() else None


def serves(dtype: torch.dtype, isa: str | None, channels_innermost: bool, channels: int, pixels: int) -> bool:
    """Returns whether the kernels serve a call on the CPU.

    Args:
        dtype: dtype of the result.
        isa: instruction set, as `current_isa` returns it.
        channels_innermost: whether channels are adjacent in memory.
        channels: number of input channels or output channels, whichever is lower.
        pixels: number of pixels per image.
    """
    if why_not(dtype, isa) is not None:
        return False
    if dtype == torch.bfloat16 and multiplies(dtype, isa):
        least = LEAST_CHANNELS_BFLOAT16, LEAST_PIXELS_BFLOAT16
        return channels_innermost and channels >= least[0] and pixels >= least[1]
    return channels >= LEAST_CHANNELS and pixels >= LEAST_PIXELS


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_input: bool = False,
) -> Tensor:
    """Returns ``conv2d(x, weight, bias, padding=1) + residual``, with ``silu(x)`` for ``x`` if `silu_input`.

    Args:
        x: (N, C_in, H, W); the memory format channels_last is the fastest.
        weight: (C_out, C_in, 3, 3).
        bias: (C_out); default: none.
        residual: (N, C_out, H, W), added to the result; default: none.
        silu_input: whether to convolve silu(x), the order of LiteVAE's ResBlocks.

    Returns:
        (N, C_out, H, W) in x's dtype, or under autocast in that of autocast.

    Raises:
        TypeError: a tensor is not float32, float64, float16 or bfloat16.
        ValueError: x is not 4-D, weight is not (C_out, C_in, 3, 3) for x's C_in, or bias or residual has another
            shape.
        RuntimeError: `torch.nn.functional.conv2d` raises it, for example for a weight of another dtype.
    """
    check_tensor(x, "x")
    check_tensor(weight, "weight")
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; (C_out, {x.shape[1]}, 3, 3) is needed for x's channels"
        )
    batch, _, height, width = x.shape
    outputs = weight.shape[0]
    if bias is not None:
        check_tensor(bias, "bias")
        if bias.shape != (outputs,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; ({outputs},) is needed")
    if residual is not None:
        check_residual(residual, (batch, outputs, height, width))
    if _is_fused(x, weight, bias, residual):
        x = x.to(result_dtype(x))  # The backward pass keeps this tensor.
        if silu_input and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            x, silu_input = F.silu(x), False
        return op.conv3x3(x, weight, bias, residual, silu_input)
    return reference.forward(x, weight, bias, residual, silu_input)


def _is_fused(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Returns whether the kernels serve a call, which PyTorch's convolution could always serve as well."""
    if x.device.type != "cpu":
        return False
    dtype = result_dtype(x)
    operands = [t for t in (x, weight, bias) if t is not None]
    if torch.is_autocast_enabled("cpu"):
        same = all(t.dtype != torch.float64 for t in operands)  # Autocast does not convert float64.
    else:
        same = all(t.dtype == dtype for t in operands)
    tensors = operands if residual is None else [*operands, residual]
    return (
        same
        and all(t.device == x.device for t in tensors)
        and serves(
            dtype,
            current_isa(),
            x.stride(1) == 1,
            min(weight.shape[:2]),
            x.shape[2] * x.shape[3],
        )
        and not torch.compiler._is_exporting_flag  # In torch 2.11, is_exporting() is also true when compiling.
        and choose("cpu") == "native"
    )


def describe_backend(device_type: str, dtype: torch.dtype | None = None) -> str:
    """Returns what serves calls on a device, for `litevae_kernels.info`.

    Args:
        device_type: type of the device.
        dtype: dtype of the result; default: all of them.
    """
    if device_type != "cpu" or forced_backend() not in (None, "native"):
        return "PyTorch's convolution"
    isa = current_isa()
    if dtype is None:
        served = [str(d).removeprefix("torch.") for d in DTYPES if why_not(d, isa) is None]
        if served:
            return f"native for {', '.join(served)}, else PyTorch's convolution"
        return f"PyTorch's convolution   (not native: {why_not(torch.float32, isa)})"
    reason = why_not(dtype, isa)
    if reason is not None:
        return f"PyTorch's convolution   (not native: {reason})"
    if dtype == torch.float32 or not multiplies(dtype, isa):
        limits, how = (LEAST_CHANNELS, LEAST_PIXELS), "" if dtype == torch.float32 else " in float32"
    else:
        limits, how = (LEAST_CHANNELS_BFLOAT16, LEAST_PIXELS_BFLOAT16), " if channels are innermost"
    return f"native{how}, from {limits[0]} channels and {limits[1]} pixels; else PyTorch's convolution"
