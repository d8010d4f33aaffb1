"""Checks, conversions and derivatives that all operators share."""

import contextlib
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from litevae_kernels.backend import is_tracing

# The values are the dtype codes of the core (csrc/common/tensor_view.h).
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


LARGEST_EPS = torch.finfo(torch.float32).max

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxtuple = _short.maxlist = 8


def shown(value: object) -> str:
    """Returns `value` for an error message, in one line of at most 100 characters."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    try:
        text = _short.repr(value)
    except ValueError:  # Python does not convert an integer of thousands of digits to text.
        text = f"a {type(value).__name__}"
    return " ".join(text.split())[:100]


def shape_of(x: Tensor) -> str:
    """Returns the shape of `x` for an error message."""
    return shown(tuple(x.shape))


def is_integer(value: object) -> TypeGuard[int]:
    """Returns whether `value` is an integer, of Python, NumPy or a compiled graph, and not a bool."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def _plain_keys() -> frozenset[int]:
    """Returns the dispatch keys of tensors on a CPU or a GPU, of inference mode and of others."""
    key = torch._C.DispatchKey
    sets = []
    for kinds in (
        (key.CPU, key.AutocastCPU, key.AutogradCPU),
        (key.CUDA, key.AutocastCUDA, key.AutogradCUDA),
    ):
        dense, autocast, autograd = map(torch._C.DispatchKeySet, kinds)
        inference = dense | autocast
        sets += [inference, inference | autograd | torch._C.DispatchKeySet(key.ADInplaceOrView)]
    return frozenset(keys.raw_repr() for keys in sets)


_PLAIN_KEYS = _plain_keys()
_NO_GUARD = contextlib.nullcontext()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_dispatch_keys = torch._C._dispatch_keys


def in_inference_mode() -> bool:
    """Returns whether a call needs no `autograd.Function`; under `torch.no_grad` it does, for forward-mode tangents."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def is_plain(*tensors: Tensor | None) -> bool:
    """Returns whether a call in inference mode may skip PyTorch's dispatcher, which takes 4 microseconds.

    That is so if nothing listens to the dispatcher (modes such as FakeTensorMode, the profiler), and if it would hand
    all tensors to the kernel as they are: no subclasses, no lazy negation.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or _profiler_enabled():
        return False
    for x in tensors:  # a generator in all() would take a microsecond
        if x is not None and (type(x) not in _PLAIN_TYPES or _dispatch_keys(x).raw_repr() not in _PLAIN_KEYS):
            return False
    return True


def check_tensor(x: object, name: str) -> None:
    """Raises a TypeError unless `x` is a dense tensor of a dtype in `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed")
    if x.dtype not in DTYPES:
        check_dtype(x.dtype, f"{name} has dtype")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(
            f"{name} is {'nested' if x.is_nested else x.layout}; a dense (strided) tensor is needed"
        )


def check_dtype(dtype: object, what: str) -> None:
    """Raises a TypeError, whose message begins with `what`, unless `dtype` is in `DTYPES`."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"{what} {shown(dtype)}; allowed: {allowed}")


def check_device(x: Tensor, name: str, like: Tensor, owner: str) -> None:
    """Raises a ValueError unless `x` is on the device of `like`, which belongs to `owner`."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; allowed: {owner}'s device, {like.device}")


def check_operand(x: Tensor, name: str, like: Tensor) -> None:
    """Checks the weight or the bias of a convolution with the input `like`.

    Raises:
        TypeError: the dtypes differ, and autocast does not convert them. It converts all but float64.
        ValueError: the devices differ.
    """
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; allowed: x's device, {like.device}")
    if x.dtype != like.dtype:
        device_type = like.device.type
        # The query raises an error for the meta device.
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        if not autocast or torch.float64 in (x.dtype, like.dtype):
            raise TypeError(f"{name} has dtype {x.dtype}; the same dtype as x's is needed, {like.dtype}")


def check_bias(bias: object, channels: int, like: Tensor) -> None:
    """Checks the bias of a convolution with `channels` outputs and the input `like`.

    Raises:
        TypeError: `check_tensor` or `check_operand` does not accept it.
        ValueError: it has another shape than (channels,), or is on another device than `like`.
    """
    check_tensor(bias, "bias")
    assert isinstance(bias, Tensor)
    if bias.shape != (channels,):
        raise ValueError(f"bias has shape {shape_of(bias)}; ({channels},) is needed")
    check_operand(bias, "bias", like)


def check_flag(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; True or False is needed")


def check_eps(eps: object) -> float:
    """Returns `eps` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive, or float32 cannot hold it.
    """
    if isinstance(eps, bool) or not isinstance(eps, (float, int, numbers.Real)):
        raise TypeError(f"eps is {shown(eps)}; a positive number is needed")
    if not 0 < eps <= LARGEST_EPS:  # type: ignore[operator]
        raise ValueError(f"eps is {shown(eps)}; a positive number is needed, at most {LARGEST_EPS:.2g}")
    return float(eps)


def check_residual(residual: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Checks the residual of a result of `shape` on the device of `like`.

    Raises:
        TypeError: `check_tensor` does not accept it.
        ValueError: it has another shape, or is on another device.
    """
    check_tensor(residual, "residual")
    assert isinstance(residual, Tensor)
    if residual.shape != shape:
        raise ValueError(f"residual has shape {shape_of(residual)}; the result's is needed, {shown(shape)}")
    check_device(residual, "residual", like, "x")


def refuse_tangents(operator: str, backend: str, *tensors: Tensor | None) -> None:
    """Raises a NotImplementedError if one of `tensors` has a forward-mode tangent, which a kernel would lose.

    Args:
        operator: name of the public function.
        backend: backend that would serve the call; not the reference, which PyTorch differentiates in either mode.
        tensors: the arguments of the call.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{operator} on backend {backend!r} has no jvp for forward-mode derivatives; call it under "
            '`with litevae_kernels.use_backend("reference"):`'
        )


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    """Returns ``y + residual`` in y's dtype; without gradients, the sum replaces y."""
    # `torch.jit.trace` checks itself by tracing again without gradients, and compares the graphs.
    keep = torch.is_grad_enabled() or is_tracing()
    return y + residual.to(y.dtype) if keep else y.add_(residual)


def check_memory_format(memory_format: object) -> None:
    """Raises a ValueError unless `memory_format` is contiguous, channels_last or None."""
    if memory_format is not None and not (
        isinstance(memory_format, torch.memory_format)
        and memory_format in (torch.contiguous_format, torch.channels_last)
    ):
        raise ValueError(
            f"memory_format is {shown(memory_format)}; allowed: torch.contiguous_format, torch.channels_last"
        )


def device_type_of(x: Tensor) -> str:
    """Returns ``x.device.type``, for a CPU without the objects that this makes on the way."""
    return "cpu" if x.is_cpu else x.device.type


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the channels of (N, C, H, W) are innermost in memory; a slice is judged by its strides."""
    channels, stride = x.shape[1], x.stride()
    return channels > 1 and stride[1] == 1 and stride[3] >= channels


def memory_format_of(channels_last: bool) -> torch.memory_format:
    """Returns PyTorch's name for the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_output(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    """Returns memory for a result (N, `channels`, H, W) of `x` (N, C, H, W)."""
    batch, _, height, width = x.shape
    return empty_4d((batch, channels, height, width), x.dtype, x.device, channels_last)


def empty_4d(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> Tensor:
    """Returns memory for a tensor (N, C, H, W) in a memory format."""
    _, c, h, w = shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    # It is faster by 0.6 us than torch.empty with a memory format.
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def in_layout(x: Tensor, channels_innermost: bool) -> Tensor:
    """Returns `x`, or a copy of it, with adjacent channels or, if not `channels_innermost`, adjacent pixels."""
    adjacent = x.stride(1) == 1 if channels_innermost else x.stride(3) == 1
    return x if adjacent else x.contiguous(memory_format=memory_format_of(channels_innermost))


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 if any of `dtypes` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_format(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Returns `x` in another dtype and layout, or `x` itself if it has both."""
    memory_format = memory_format_of(channels_last)
    return x.to(dtype=dtype, memory_format=memory_format).contiguous(memory_format=memory_format)


def native_view(x: Tensor | None) -> tuple[int, int, Sequence[int], tuple[int, ...]] | None:
    """Returns a tensor as the compiled core takes it; None stays None.

    `x` has four dimensions, or one, (C), which the core takes as (1, C, 1, 1).
    """
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.shape, x.stride())


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one for the core, which does not restore the one before."""
    # Most calls need no guard, which takes the host as long as the launch of a kernel.
    return _NO_GUARD if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Returns the address of a GPU's current stream, without an object of Python around it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


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
