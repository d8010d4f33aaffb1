"""What every operator asks of its tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from litevae_kernels.backend import core

# The values are the core's codes (csrc/common/tensor_view.h).
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def check_tensor(x: object, name: str) -> None:
    """TypeError unless `x` is a dense tensor of a dtype in `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed")
    check_dtype(x.dtype, f"{name} has dtype")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(
            f"{name} is {'nested' if x.is_nested else x.layout}; a dense (strided) tensor is needed"
        )


def check_dtype(dtype: object, what: str) -> None:
    """TypeError, beginning with `what`, unless `dtype` is in `DTYPES`."""
    if dtype not in DTYPES:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"{what} {dtype}; allowed: {allowed}")


def check_residual(residual: object, shape: Sequence[int]) -> None:
    """TypeError or ValueError unless `residual` is a tensor that `check_tensor` takes, of a result's `shape`."""
    check_tensor(residual, "residual")
    assert isinstance(residual, Tensor)
    if residual.shape != tuple(shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; the result's is needed, {tuple(shape)}"
        )


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    """``y + residual`` in y's dtype; in y itself where no transform or derivative is about."""
    return y + residual.to(y.dtype) if torch.is_grad_enabled() else y.add_(residual)


def check_memory_format(memory_format: object) -> None:
    """ValueError unless `memory_format` is contiguous, channels_last or None."""
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format is {memory_format}; allowed: torch.contiguous_format, torch.channels_last"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of (N, C, H, W) are innermost in memory; sliced tensors count by their strides."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def memory_format_of(channels_last: bool) -> torch.memory_format:
    """PyTorch's name for the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where any of `dtypes` is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_format(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """`x` in another dtype and layout; `x` itself where it has both."""
    memory_format = memory_format_of(channels_last)
    return x.to(dtype=dtype, memory_format=memory_format).contiguous(memory_format=memory_format)


def native_view(x: Tensor | None) -> Any:
    """A `TensorView` of the compiled core: four dimensions, or (C), which becomes (1, C, 1, 1); None stays None."""
    if x is None:
        return None
    assert core is not None
    size: tuple[int, ...] = x.shape
    stride = x.stride()
    if x.ndim == 1:  # not by a view of the tensor, which takes as long as a small kernel
        size, stride = (1, size[0], 1, 1), (0, stride[0], 0, 0)
    return core.TensorView(x.data_ptr(), DTYPES[x.dtype], size, stride)


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)``, which is plain PyTorch, that can be differentiated in their turn.

    In the memory format of their inputs. None for the inputs that are not `needed`.
    """
    # one tensor may be given as two inputs, and each has a gradient of its own
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [
        _like(next(found), x) if need and x is not None else None
        for x, need in zip(inputs, needed, strict=True)
    ]


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` in the memory format of `x`, if that has four dimensions."""
    if x.ndim != 4:
        return gradient
    return gradient.contiguous(memory_format=memory_format_of(is_channels_last(x)))
