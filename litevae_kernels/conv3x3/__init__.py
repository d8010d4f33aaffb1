"""The 3x3 convolution of ResBlocks, with the residual added and SiLU applied on the way.

Stride 1, one pixel of zero padding. On a CPU with AVX512-BF16 (and without AMX, which PyTorch's own convolution uses),
bfloat16 calls are served by kernels that need 16 multiplications where a direct convolution needs 36 (Winograd's
F(2x2, 3x3), Lavin and Gray 2016), for the result and for both gradients. They round both transformed factors to
bfloat16, beside the result, which makes the error about 2.5 times a direct bfloat16 convolution's; sums of four values
must not overflow, and a NaN or an infinity reaches the whole 2x2 tiles of results that it has a part in. Derivatives
of higher order are PyTorch's; there are no forward-mode ones, and no `torch.func` transforms.

All other calls are served by PyTorch's convolution: other devices and dtypes, narrow layers, small images, channels
that are not innermost in memory, `torch.export`, and all of them under ``use_backend("reference")``. There is no Triton
kernel: where Triton is forced and does not serve the CPU, a call that the kernels would have served raises.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.backend import choose, core
from litevae_kernels.conv3x3 import op, reference
from litevae_kernels.tensors import check_residual, check_tensor


def _why_not() -> str | None:
    if core is None:
        return "the compiled core did not load"
    if core.has_amx_bf16():
        return "this CPU has AMX, with which PyTorch's convolution is faster"
    return None if core.isa() == "avx512bf16" else f"it needs AVX512-BF16, and this CPU runs {core.isa()}"


WHY_NOT = _why_not()  # the kernel serves no call on this machine; None if it serves some
# Below either, PyTorch's convolution is faster: the kernel pads channels to as many, and transforms all weights
# whatever the image's size. Not the batch's: an image's result does not depend on those beside it.
LEAST_CHANNELS = 32
LEAST_PIXELS = 128


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_input: bool = False,
) -> Tensor:
    """``conv2d(x, weight, bias, padding=1) + residual``, or that of ``silu(x)``.

    Args:
        x: (N, C_in, H, W); channels_last is the fastest.
        weight: (C_out, C_in, 3, 3).
        bias: (C_out); default: none.
        residual: (N, C_out, H, W), added to the result; default: none.
        silu_input: convolve silu(x), the order of LiteVAE's ResBlocks.

    Returns:
        (N, C_out, H, W) in x's dtype, or autocast's where that is on.

    Raises:
        TypeError: a tensor is not float32, float64, float16 or bfloat16.
        ValueError: x is not 4-D, weight not (C_out, C_in, 3, 3) for x's C_in, or bias or residual of another shape.
        RuntimeError: what `torch.nn.functional.conv2d` raises, such as for a weight of another dtype.
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
        if torch.is_grad_enabled():
            x = x.to(torch.bfloat16)  # what is kept for the backward pass
            if silu_input and (x.requires_grad or weight.requires_grad):
                x, silu_input = F.silu(x), False
        return op.conv3x3(x, weight, bias, residual, silu_input)
    return reference.forward(x, weight, bias, residual, silu_input)


def _is_fused(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernel serves a call. What it takes, PyTorch's convolution takes as well."""
    if WHY_NOT is not None or x.device.type != "cpu":
        return False
    operands = [t for t in (x, weight, bias) if t is not None]
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        same = all(t.dtype != torch.float64 for t in operands)  # which autocast leaves alone
    else:
        dtype = x.dtype
        same = all(t.dtype == dtype for t in operands)
    tensors = operands if residual is None else [*operands, residual]
    return (
        dtype == torch.bfloat16
        and same
        and all(t.device == x.device for t in tensors)
        and x.stride(1) == 1
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and x.shape[2] * x.shape[3] >= LEAST_PIXELS
        and not torch.compiler._is_exporting_flag  # torch 2.11 takes is_exporting() for true when compiling
        and choose("cpu") == "native"
    )
