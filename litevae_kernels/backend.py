"""The choice of the backend that serves a call.

``native`` is the compiled core (C++ on the CPU, CUDA C++ on a GPU), ``triton`` the Triton kernels, and
``reference`` plain PyTorch on any device. `use_backend` or the environment variable ``LITEVAE_BACKEND`` forces
one of them; a call that the forced backend cannot serve raises an error.

The native CPU kernels use the best instruction set that the CPU has. The environment variable ``LITEVAE_CPU_ISA``
selects a lower one: ``baseline``, ``avx2``, ``avx512`` or ``avx512bf16`` on x86-64, and only ``baseline`` on other
architectures. It is read when the core is loaded, and a set that the CPU lacks raises a ValueError.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

from litevae_kernels.core_interface import INTERFACE, OPERATORS

BACKENDS = ("reference", "native", "triton")


def _load_core() -> tuple[ModuleType | None, str]:
    """Returns the compiled core, or None and the reason why there is none."""
    try:
        core = importlib.import_module("litevae_core")
    except ImportError as error:
        return None, str(error)
    if core.interface != INTERFACE:
        return None, (
            f"it was built from another version of the sources (interface {core.interface}, not {INTERFACE})"
        )
    if core.operators != OPERATORS:
        return None, (
            f"it was built from another version of the sources (operators {', '.join(core.operators)}; "
            f"not {', '.join(OPERATORS)})"
        )
    return core, ""


core, core_error = _load_core()


def _lower_isa(name: str | None) -> None:
    """Makes the core use the instruction set `name`; None keeps the best one."""
    if name is None or core is None:
        return
    if name not in core.isas:
        raise ValueError(
            f"LITEVAE_CPU_ISA is {name[:40]!r}; allowed on this CPU, which has {core.isas[-1]}: {', '.join(core.isas)}"
        )
    core.set_isa(name)


_lower_isa(os.environ.get("LITEVAE_CPU_ISA") or None)

cuda_built = core is not None and bool(core.cuda_version)
triton_installed = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, so its value at import is the one that counts.
triton_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


def read_mode(variable: str, value: str | None, modes: tuple[str, ...]) -> str:
    """Returns the value of an environment variable, which is one of `modes`; the first of them for None.

    Raises:
        ValueError: it is none of them.
    """
    if value is not None and value not in modes:
        raise ValueError(f"{variable} is {value[:40]!r}; allowed: {', '.join(modes)}")
    return value or modes[0]


_from_environment = os.environ.get("LITEVAE_BACKEND") or None
if _from_environment is not None:
    _check_name(_from_environment, "LITEVAE_BACKEND")


class _Choice(threading.local):
    forced: str | None = _from_environment


_choice = _Choice()
# The latest choice of any thread. The compiler reads it because every version of torch traces and guards a global
# variable, but torch 2.11 does not guard a thread's own values (or those of a ContextVar).
_latest: str | None = _from_environment


def forced_backend() -> str | None:
    """Returns the backend that `use_backend` or the environment forces in this thread; None if neither does.

    While `torch.compile` traces, the latest choice of any thread counts.
    """
    return _latest if torch.compiler.is_compiling() else _choice.forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every operator that this thread calls inside the ``with`` block.

    The backward pass of a call uses the backend of its forward pass, wherever it runs. Under `torch.compile`
    the choice is part of the compiled graph: another choice compiles the function again, and if several threads make
    different choices, the latest one counts.

    Args:
        name: ``"reference"`` (plain PyTorch), ``"native"`` (compiled C++/CUDA) or ``"triton"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: an operator inside the block cannot be served by that backend.
    """
    global _latest
    previous = _choice.forced
    _choice.forced = _latest = _check_name(name, "backend")
    try:
        yield
    finally:
        _choice.forced = _latest = previous


P = ParamSpec("P")
T = TypeVar("T")


def keep_backend(function: Callable[P, T]) -> Callable[P, T]:
    """Returns `function` bound to the backend that is forced now, so that it can run in another thread.

    Gradient checkpointing needs this, because the recomputation runs in the thread of the backward pass.
    """
    forced = None if torch.compiler.is_compiling() else forced_backend()
    if forced is None:
        return function

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with use_backend(forced):
            return function(*args, **kwargs)

    return call


def _driver_version() -> tuple[int, int]:
    """Returns the newest CUDA version that the GPU driver supports; (0, 0) if the driver's library does not load."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _target_serves(target: str, major: int, minor: int, newest_ptx: bool) -> bool:
    """Returns whether code for `target`, such as "80", "90a", "100f" or "PTX-80", runs on a GPU sm_{major}{minor}.

    Machine code serves GPUs of its major version from its minor version on, and PTX all newer GPUs if the driver
    compiles it. Architecture-specific code (a) serves one GPU only, and family-specific code (f) never leaves the
    major version, even as PTX.
    """
    kind, digits, suffix = re.fullmatch(r"(PTX-|)(\d+)([af]?)", target).groups()  # type: ignore[union-attr]
    built, gpu = divmod(int(digits), 10), (major, minor)
    if kind and not newest_ptx:
        return False
    if suffix == "a":
        return gpu == built
    return gpu >= built and (major == built[0] or (bool(kind) and not suffix))


@functools.cache
def _find_why_no_cuda() -> str | None:
    assert core is not None
    if not cuda_built:
        return f"the core has no CUDA: {core.cuda_reason}"
    if not torch.cuda.is_available():
        return None  # The core would serve a GPU if there were one.
    toolkit = tuple(int(number) for number in core.cuda_version.split(".")[:2])
    driver = _driver_version()
    if driver[0] < toolkit[0]:
        newest = f"CUDA {driver[0]}.{driver[1]}"
        return f"the core was built by CUDA {core.cuda_version}, and the GPU driver supports {newest}"
    targets = core.cuda_architectures.split()
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not any(_target_serves(target, major, minor, driver >= toolkit) for target in targets):
            return f"the core was built for {', '.join(targets)}, and GPU {device} is sm_{major}{minor}" + (
                f" with a driver for CUDA {driver[0]}.{driver[1]}" if driver < toolkit else ""
            )
    return None


# The decorator must not wrap the cached function itself: the compiler would trace into the cache.
@torch.compiler.assume_constant_result
def _why_no_cuda() -> str | None:
    return _find_why_no_cuda()


def why_not(backend: str, device_type: str) -> str | None:
    """Returns why `backend` cannot serve tensors on `device_type`; None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if core is None:
            return f"the compiled core did not load ({core_error}); install with `pip install .`"
        if device_type == "cpu":
            return None
        if device_type == "cuda":
            return _why_no_cuda()
        return f"the compiled core does not support device {device_type!r}"
    if not triton_installed:
        return "Triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and triton_interpreted):
        return None
    if device_type == "cpu":
        return "Triton runs on the CPU only with TRITON_INTERPRET=1 set before the first import"
    return f"the Triton kernels do not support device {device_type!r}"


def is_tracing() -> bool:
    """Returns whether `torch.jit.trace` records the calls of this thread."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Returns whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` records calls for other software."""
    # In torch 2.11, is_exporting() is also true when compiling.
    return torch.compiler._is_exporting_flag or (not torch.compiler.is_compiling() and is_tracing())


def is_transforming() -> bool:
    """Returns whether a transform of `torch.func`, such as vmap, grad or jvp, is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def choose(device_type: str) -> str:
    """Returns the backend that serves a call with tensors on `device_type`.

    Native comes first, then Triton on a GPU, then the reference. Under `torch.export`, `torch.jit.trace` and the
    transforms of `torch.func`, which need PyTorch's own operators, it is the reference. Otherwise, the result depends
    on the argument, on the build and on `use_backend` alone, so `torch.compile` can trace and guard it.

    Raises:
        RuntimeError: the forced backend cannot serve the call; the message says why.
    """
    forced = forced_backend()
    if forced is not None:
        reason = why_not(forced, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot serve a {device_type} tensor: {reason}")
        if forced != "reference" and is_transforming():
            raise RuntimeError(
                f"backend {forced!r} cannot serve the transforms of torch.func: force none, or 'reference'"
            )
        return forced
    if is_transforming():
        _warn_transform()
        return "reference"
    if is_exporting():
        return "reference"
    if why_not("native", device_type) is None:
        return "native"
    if device_type == "cuda" and triton_installed:
        return "triton"
    if device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_slow(device_type)
    return "reference"


@functools.cache
def _warn_transform() -> None:
    warnings.warn(
        "litevae_kernels serves the transforms of torch.func with plain PyTorch, several times slower than its kernels",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _warn_slow(device_type: str) -> None:
    warnings.warn(
        f"litevae_kernels serves {device_type} tensors with plain PyTorch, several times slower than its "
        f"kernels: {why_not('native', device_type)}",
        RuntimeWarning,
        stacklevel=4,
    )
