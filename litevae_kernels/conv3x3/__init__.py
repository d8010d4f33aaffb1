"""The 3x3 convolution of ResBlocks, which also applies SiLU to its input and adds the residual.

The stride is 1 and the padding one pixel of zeros. Kernels of the compiled core serve the CPU, for the result and for
both gradients, by Winograd's minimal filtering (Lavin and Gray 2016):

- float32, and bfloat16 and float16 on CPUs without their arithmetic: F(4x4, 3x3) with 36 multiplications where a
  direct convolution needs 144, or F(2x2, 3x3) with 16 instead of 36 in images of up to about 10x10 pixels.
  Half precision is widened when it is loaded, everything between is float32, and the result is rounded once.
- bfloat16 with channels innermost in memory on a CPU with AVX512-BF16 (and without AMX, which PyTorch's own
  convolution uses): F(2x2, 3x3) in bfloat16. Both transformed factors are rounded, in addition to the result, which
  makes the error about 2.5 times that of a direct bfloat16 convolution.

In float32 the error relative to float64 (norm of the difference by norm of the result, normal inputs, AVX-512) is

| channels in, out | F(2x2) | F(4x4) | direct (oneDNN) |
| --- | --- | --- | --- |
| 3, 128 | 1.2e-7 | 3.5e-7 | 0.9e-7 |
| 16, 16 | 1.6e-7 | 4.8e-7 | 2.1e-7 |
| 32, 32 | 2.0e-7 | 5.9e-7 | 2.2e-7 |
| 96, 96 | 3.1e-7 | 9.0e-7 | 2.2e-7 |
| 256, 256 | 3.6e-7 | 1.0e-6 | 2.3e-7 |
| 512, 512 | 3.6e-7 | 1.1e-6 | 2.4e-7 |

for the result and the gradient of the input, whatever the size of the image; for the gradient of the weight it is
0.8e-6 (1x96x96x32x32) to 1.5e-6 (4x32x32x256x256), where the direct one has 0.2e-6 and 1.8e-6.

Sums of a tile's values must not overflow, and a NaN or an infinity spreads to every tile of results that depends on
it. Derivatives of higher order are computed by PyTorch. Forward-mode derivatives are not supported.

On a GPU, a Triton kernel may serve half precision in channels_last without gradients; it is off by default (see gpu).

PyTorch's direct convolution serves all other calls: other devices, float64, narrow layers, small images,
`torch.export`, `torch.func`, and every call under ``use_backend("reference")``, which is the way to an exact direct
convolution. On a CPU without the arithmetic of a half precision, it computes in float32 and rounds once. On a GPU, a
kernel adds the bias and the residual to its result in one pass while gradients are off; `torch.compile` joins
the two passes itself. If Triton is forced and does not serve the CPU, a call that the kernels would have served raises
an error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.arithmetic import current_isa, result_dtype
from litevae_kernels.backend import choose, forced_backend
from litevae_kernels.conv3x3 import addition, gpu, op
from litevae_kernels.conv3x3.dispatch import describe, serves
from litevae_kernels.tensors import (
    check_bias,
    check_flag,
    check_operand,
    check_residual,
    check_tensor,
    refuse_tangents,
    shape_of,
)


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
        TypeError: a tensor is not float32, float64, float16 or bfloat16; weight or bias has another dtype than x
            without autocast to convert them; or `silu_input` is not a bool.
        ValueError: x is not 4-D, weight is not (C_out, C_in, 3, 3) for x's C_in, bias or residual has another
            shape, a size other than the batch is zero, or the tensors are on several devices.
        NotImplementedError: a tensor has a forward-mode tangent, and a kernel would serve the call.
    """
    check_arguments(x, weight, bias, residual)
    check_flag(silu_input, "silu_input")
    if is_fused(x, weight):
        refuse_tangents("conv3x3", "native", x, weight, bias, residual)
        x = x.to(result_dtype(x))  # The backward pass keeps this tensor.
        if silu_input and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            x, silu_input = F.silu(x), False
        return op.conv3x3(x, weight, bias, residual, silu_input)
    return addition.convolve(x, weight, bias, residual, silu_input)


def check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, skip: Tensor | None = None
) -> None:
    """Raises the errors of `conv3x3`; the channels of `skip` follow those of `x`."""
    check_tensor(x, "x")
    check_tensor(weight, "weight")
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    batch, channels, height, width = x.shape
    if skip is not None:
        channels += skip.shape[1]
    filters = weight.shape
    if len(filters) != 4 or filters[1:] != (channels, 3, 3):
        raise ValueError(
            f"weight has shape {shape_of(weight)}; (C_out, {channels}, 3, 3) is needed for x's channels"
        )
    check_operand(weight, "weight", x)
    outputs = filters[0]
    if not (channels and height and width and outputs):
        raise ValueError(
            f"x has shape {shape_of(x)} and weight {shape_of(weight)}; all sizes but the batch must be at least 1"
        )
    if bias is not None:
        check_bias(bias, outputs, x)
    if residual is not None:
        check_residual(residual, (batch, outputs, height, width), x)


def is_fused(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernels serve a call, which PyTorch's convolution could always serve as well."""
    # This comes first because sizes that are read while torch.jit traces get into the graph.
    if x.is_cuda:
        return gpu.serves(result_dtype(x), x)
    if not x.is_cpu or choose("cpu") != "native":
        return False
    pixels = x.shape[2] * x.shape[3]
    return serves(result_dtype(x), current_isa(), x.stride(1) == 1, min(weight.shape[:2]), pixels)


def describe_backend(device_type: str, dtype: torch.dtype) -> str:
    """Returns what serves calls on a device, for `litevae_kernels.info`.

    Args:
        device_type: type of the device.
        dtype: dtype of the result.
    """
    if device_type == "cuda":
        return gpu.describe(dtype)
    if device_type != "cpu" or forced_backend() not in (None, "native"):
        return "PyTorch's convolution"
    isa = current_isa()
    return describe(dtype, isa)
