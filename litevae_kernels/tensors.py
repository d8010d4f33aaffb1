"""Checks, conversions and derivatives that all operators share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from litevae_kernels.backend import core, is_tracing

# The values are the dtype codes of the core (csrc/common/tensor_view.h).
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def check_tensor(x: object, name: str) -> None:
    """Raises a TypeError unless `x` is a dense tensor of a dtype in `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed")
    check_dtype(x.dtype, f"{name} has dtype")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(
            f"{name} is {'nested' if x.is_nested else x.layout}; a dense (strided) tensor is needed"
        )


def check_dtype(dtype: object, what: str) -> None:
    """Raises a TypeError, whose message begins with `what`, unless `dtype` is in `DTYPES`."""
    if dtype not in DTYPES:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"{what} {dtype}; allowed: {allowed}")


def check_residual(residual: object, shape: Sequence[int]) -> None:
    """Checks the residual of a result of `shape`.

    Raises:
        TypeError: `check_tensor` does not accept it.
        ValueError: it has another shape.
    """
    check_tensor(residual, "residual")
    assert isinstance(residual, Tensor)
    if residual.shape != tuple(shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; the result's is needed, {tuple(shape)}"
        )


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    """Returns ``y + residual`` in y's dtype; without gradients, the sum replaces y."""
    # `torch.jit.trace` checks itself by tracing again without gradients, and compares the graphs.
    keep = torch.is_grad_enabled() or is_tracing()
    return y + residual.to(y.dtype) if keep else y.add_(residual)


def check_memory_format(memory_format: object) -> None:
    """Raises a ValueError unless `memory_format` is contiguous, channels_last or None."""
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format is {memory_format}; allowed: torch.contiguous_format, torch.channels_last"
        )


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the channels of (N, C, H, W) are innermost in memory; a slice is judged by its strides."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def memory_format_of(channels_last: bool) -> torch.memory_format:
    """Returns PyTorch's name for the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 if any of `dtypes` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_format(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Returns `x` in another dtype and layout, or `x` itself if it has both."""
    memory_format = memory_format_of(channels_last)
    return x.to(dtype=dtype, memory_format=memory_format).contiguous(memory_format=memory_format)


def native_view(x: Tensor | None) -> Any:
    """Returns a `TensorView` of the compiled core.

    `x` has four dimensions, or one, (C), which becomes (1, C, 1, 1). None stays None.
    """
    if x is None:
        return None
    assert core is not None
    size: tuple[int, ...] = x.shape
    stride = x.stride()
    if x.ndim == 1:  # Making a view of the tensor would take as long as a small kernel.
        size, stride = (1, size[0], 1, 1), (0, stride[0], 0, 0)
    return core.TensorView(x.data_ptr(), DTYPES[x.dtype], size, stride)


def scratch_memory(size: int, device: torch.device) -> Tensor:
    """Returns `size` bytes for a CUDA call of the core, aligned for any type.

    Torch's allocator tracks streams and graph capture, so the memory can be released once the kernels are queued.
    """
    return torch.empty(size, dtype=torch.uint8, device=device)


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Returns gradients of ``function(*inputs)`` that can themselves be differentiated.

    Args:
        function: plain PyTorch.
        inputs: arguments of `function`.
        needed: for each input, whether its gradient is wanted.
        grad: gradient of the function's result.

    Returns:
        A gradient per input, in the input's memory format; None for inputs that are not needed.
    """
    # One tensor may be given as two inputs, each of which has its own gradient.
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [
        _like(next(found), x) if need and x is not None else None
        for x, need in zip(inputs, needed, strict=True)
    ]


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """Returns `gradient`, in the memory format of `x` if that has four dimensions."""
    if x.ndim != 4:
        return gradient
    return gradient.contiguous(memory_format=memory_format_of(is_channels_last(x)))
