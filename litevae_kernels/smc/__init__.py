"""Self-modulated convolution (LiteVAE, Equation 3): a convolution that normalises its own weights.

w'[o,i,k] = gain * scale[i] * w[o,i,k] / (sqrt(sum_{i,k} (scale[i] * w[o,i,k])^2) + eps)

The scales and the gain belong to the layer and not to the sample, so this is one ordinary convolution: StyleGAN2's
modulated convolution with one style for all samples, and so without a filter bank per sample.

Weights are float64, float32, bfloat16 or float16. The arithmetic runs in float32 (float64 for float64). The functions
are differentiable any number of times. The transforms of `torch.func` run on the reference backend. Forward-mode
derivatives outside of them need ``use_backend("reference")``.
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
    check_bias,
    check_device,
    check_dtype,
    check_eps,
    check_flag,
    check_memory_format,
    check_operand,
    check_residual,
    check_tensor,
    device_type_of,
    is_channels_last,
    is_integer,
    refuse_tangents,
    shape_of,
    shown,
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
        TypeError: a tensor, or `dtype`, is not float32, float64, float16 or bfloat16, or `eps` is not a number.
        ValueError: the weight is not 4-D or is empty, the scale or the gain has another length, the groups do not
            divide C_out, `eps` is not positive or exceeds float32, the memory format is another one, or the tensors
            are on several devices.
        NotImplementedError: a tensor has a forward-mode tangent, and the backend is not the reference.
    """
    check_tensor(weight, "weight")
    check_tensor(scale, "scale")
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {shape_of(weight)}; 4 dimensions of at least 1 are needed: "
            f"(C_out, C_in / groups, K_h, K_w)"
        )
    c_out, c_in = weight.shape[:2]
    if scale.ndim != 1 or scale.shape[0] == 0 or scale.shape[0] % c_in or c_out % (scale.shape[0] // c_in):
        raise ValueError(
            f"scale has shape {shape_of(scale)}; ({c_in},) is needed for a weight of {shape_of(weight)}, or "
            f"a multiple of it whose factor, the groups, divides {c_out}"
        )
    if gain is not None:
        check_tensor(gain, "gain")
        if gain.shape != (1,):
            raise ValueError(f"gain has shape {shape_of(gain)}; (1,) is needed")
    eps = check_eps(eps)
    check_device(scale, "scale", weight, "the weight")
    if gain is not None:
        check_device(gain, "gain", weight, "the weight")
    if dtype is not None:
        check_dtype(dtype, "dtype is")
    check_memory_format(memory_format)
    dtype = weight.dtype if dtype is None else dtype
    channels_last = (
        is_channels_last(weight) if memory_format is None else memory_format == torch.channels_last
    )
    backend = choose(device_type_of(weight))
    if backend == "reference":
        return reference.modulate(weight, scale, gain, eps, dtype, channels_last)
    refuse_tangents("modulate_weight", backend, weight, scale, gain)
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
        TypeError: a tensor is not float32, float64, float16 or bfloat16, or another argument is not of the type above.
        ValueError: x is not 4-D, the number of its channels is not that of the scales, `groups` does not divide it or
            does not fit the weight, the padded image is smaller than the kernel, `bias` or `residual` has another
            shape, the tensors are on several devices, or `modulate_weight` raises it.
        NotImplementedError: `modulate_weight` or `conv3x3` raises it.
    """
    check_tensor(x, "x")
    check_tensor(scale, "scale")
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
    if scale.shape != (x.shape[1],):
        raise ValueError(f"scale has shape {shape_of(scale)}; x's channels are needed: ({x.shape[1]},)")
    check_tensor(weight, "weight")
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    padding = named_padding(padding, stride) if isinstance(padding, str) else pair(padding, "padding", 0)
    if type(groups) is not int and not is_integer(groups):
        raise TypeError(f"groups is {shown(groups)}; an integer is needed")
    if weight.ndim == 4 and weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"groups is {shown(groups)}; with a weight of {shape_of(weight)} it does not give x's {x.shape[1]} channels"
        )
    dtype = result_dtype(x)
    memory_format = torch.channels_last if is_channels_last(x) else None
    modulated = modulate_weight(weight, scale, gain, eps=eps, dtype=dtype, memory_format=memory_format)
    if bias is not None:
        check_tensor(bias, "bias")
        bias = bias.to(dtype)
    plain = stride == (1, 1) and padding == (1, 1) and dilation == (1, 1) and groups == 1
    if plain and weight.shape[2:] == (3, 3):
        return conv3x3(x, modulated, bias, residual=residual, silu_input=silu_input)
    check_operand(modulated, "weight", x)
    if bias is not None:
        check_bias(bias, weight.shape[0], x)
    check_flag(silu_input, "silu_input")
    if not isinstance(padding, str):
        for size, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], dilation, strict=True):
            if size == 0 or size + 2 * pad <= step * (kernel - 1):
                raise ValueError(
                    f"x has shape {shape_of(x)}; with a padding of {padding} and a dilation of {dilation}, it is "
                    f"smaller than the kernel of {weight.shape[2]}x{weight.shape[3]}"
                )

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.silu(x) if silu_input else x, weight, bias, stride, padding, dilation, groups)

    y = widened(convolve, x, modulated, bias)
    if residual is None:
        return y
    check_residual(residual, y.shape, x)
    return add_residual(y, residual)


def pair(value: object, name: str, least: int) -> tuple[int, int]:
    """Returns `value`, an integer or a sequence of one or two, as two integers from `least` to 2^31 - 1."""
    first, second = value if type(value) is tuple and len(value) == 2 else (value, value)
    # This condition is for speed.
    if type(first) is int and type(second) is int and least <= first < 2**31 and least <= second < 2**31:
        return first, second
    if isinstance(value, (tuple, list)) and 1 <= len(value) <= 2:
        first, second = value[0], value[-1]
    needed = f"{name} is {shown(value)}; an integer of at least {least} is needed, or two: (height, width)"
    if not is_integer(first) or not is_integer(second):
        raise TypeError(needed)
    if not (least <= first < 2**31 and least <= second < 2**31):
        raise ValueError(needed)
    return int(first), int(second)


def named_padding(padding: str, stride: tuple[int, int]) -> tuple[int, int] | str:
    """Returns "same", or for "valid" no padding."""
    if padding not in ("same", "valid"):
        raise ValueError(f"padding is {shown(padding)}; allowed: integers, 'same' and 'valid'")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"padding is 'same' with a stride of {stride}; it needs a stride of 1")
    return "same" if padding == "same" else (0, 0)
