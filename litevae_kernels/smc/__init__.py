"""Self-modulated convolution (LiteVAE, Equation 3): a convolution that normalises its own weights.

w'[o,i,k] = gain * scale[i] * w[o,i,k] / (sqrt(sum_{i,k} (scale[i] * w[o,i,k])^2) + eps)

The scales and the gain belong to the layer and not to the sample, so this is one ordinary convolution: StyleGAN2's
modulated convolution with one style for all samples, and so without a filter bank per sample.

Weights are float64, float32, bfloat16 or float16. The arithmetic runs in float32 (float64 for float64). The functions
are differentiable any number of times. The transforms of `torch.func` and forward-mode derivatives need the reference
backend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.arithmetic import result_dtype, widened
from litevae_kernels.backend import choose
from litevae_kernels.conv3x3 import conv3x3
from litevae_kernels.smc import op, reference
from litevae_kernels.tensors import (
    add_residual,
    check_dtype,
    check_memory_format,
    check_residual,
    check_tensor,
    is_channels_last,
)


def modulate_weight(
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Returns the weight w' of a self-modulated convolution (Equation 3).

    An all-zero filter, or one whose scales are all zero, gives zeros. Its gradient is finite in float32, where the
    slope is gain / eps.

    Args:
        weight: (C_out, C_in / groups, K_h, K_w), any strides.
        scale: (C_in), one per input channel. If there are more of them than the weight has inputs, the convolution
            is a grouped one, whose filters see the channels of their group.
        gain: (1), one for the layer; default: 1.
        eps: summand of each filter's norm.
        dtype: dtype of the result; default: the weight's.
        memory_format: `torch.contiguous_format` or `torch.channels_last`; default: the weight's.

    Returns:
        The shape of `weight`.

    Raises:
        TypeError: a tensor, or `dtype`, is not float32, float64, float16 or bfloat16.
        ValueError: the weight is not 4-D or is empty, the scale or the gain has another length, the groups do not
            divide C_out, `eps` is not positive, the memory format is another one, or the tensors are on several
            devices.
    """
    check_tensor(weight, "weight")
    check_tensor(scale, "scale")
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; 4 dimensions of at least 1 are needed: "
            f"(C_out, C_in / groups, K_h, K_w)"
        )
    c_out, c_in = weight.shape[:2]
    if scale.ndim != 1 or scale.shape[0] == 0 or scale.shape[0] % c_in or c_out % (scale.shape[0] // c_in):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; ({c_in},) is needed for a weight of {tuple(weight.shape)}, or "
            f"a multiple of it whose factor, the groups, divides {c_out}"
        )
    if gain is not None:
        check_tensor(gain, "gain")
        if gain.shape != (1,):
            raise ValueError(f"gain has shape {tuple(gain.shape)}; (1,) is needed")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; a positive number is needed")
    for name, other in (("scale", scale), ("gain", gain)):
        if other is not None and other.device != weight.device:
            raise ValueError(f"{name} is on {other.device}; allowed: the weight's device, {weight.device}")
    if dtype is not None:
        check_dtype(dtype, "dtype is")
    check_memory_format(memory_format)
    dtype = weight.dtype if dtype is None else dtype
    channels_last = (
        is_channels_last(weight) if memory_format is None else memory_format == torch.channels_last
    )
    backend = choose(weight.device.type)
    if backend == "reference":
        return reference.modulate(weight, scale, gain, eps, dtype, channels_last)
    return op.modulate_weight(weight, scale, gain, eps, dtype, channels_last, backend)


def self_modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-8,
    silu_input: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolves with the weights of `modulate_weight`: one ordinary convolution for the whole batch.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / groups, K_h, K_w).
        scale: (C_in).
        gain: (1); default: 1.
        bias: (C_out); default: none.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        eps: summand of each filter's norm.
        silu_input: whether to convolve silu(x), the order of LiteVAE's ResBlocks.
        residual: (N, C_out, H', W'), added to the result; default: none.

    Returns:
        (N, C_out, H', W') in x's dtype, or under autocast in that of autocast. The parameters may be wider: the
        modulated weight is rounded once, from float32.

    Raises:
        TypeError: a tensor is not float32, float64, float16 or bfloat16.
        ValueError: x is not 4-D, the number of its channels is not that of the scales, `groups` does not divide it or
            does not fit the weight, or `modulate_weight` raises it.
        RuntimeError: `torch.nn.functional.conv2d` raises it.
    """
    check_tensor(x, "x")
    check_tensor(scale, "scale")
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    if scale.shape != (x.shape[1],):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; x's channels are needed: ({x.shape[1]},)")
    check_tensor(weight, "weight")
    if weight.ndim == 4 and weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"groups is {groups}; with a weight of {tuple(weight.shape)} it does not give x's {x.shape[1]} channels"
        )
    dtype = result_dtype(x)
    memory_format = torch.channels_last if is_channels_last(x) else None
    modulated = modulate_weight(weight, scale, gain, eps=eps, dtype=dtype, memory_format=memory_format)
    if bias is not None:
        check_tensor(bias, "bias")
        bias = bias.to(dtype)
    plain = stride in (1, (1, 1)) and padding in (1, (1, 1)) and dilation in (1, (1, 1)) and groups == 1
    if plain and weight.shape[2:] == (3, 3):
        return conv3x3(x, modulated, bias, residual=residual, silu_input=silu_input)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.silu(x) if silu_input else x, weight, bias, stride, padding, dilation, groups)

    y = widened(convolve, x, modulated, bias)
    if residual is None:
        return y
    check_residual(residual, y.shape)
    return add_residual(y, residual)
