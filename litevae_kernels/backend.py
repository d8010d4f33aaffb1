"""Which backend serves a call.

``native`` is the compiled core (C++ on the CPU, CUDA C++ on a GPU), ``triton`` the Triton kernels, and
``reference`` plain PyTorch on any device. `use_backend` or the environment variable ``LITEVAE_BACKEND`` forces
one; forcing one that cannot serve a call raises.
"""

import contextlib
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

BACKENDS = ("reference", "native", "triton")

INTERFACE = 4  # of the compiled core; csrc/bindings.cpp names the same

core: ModuleType | None = None
core_error = ""
try:
    core = importlib.import_module("litevae_core")
    if core.interface != INTERFACE:
        core_error = (
            f"it was built from another version of the sources (interface {core.interface}, not {INTERFACE})"
        )
        core = None
except ImportError as error:
    core_error = str(error)

cuda_built = core is not None and bool(core.cuda_version)
triton_installed = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, so what counts is its value at import.
triton_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


_from_environment = os.environ.get("LITEVAE_BACKEND") or None
if _from_environment is not None:
    _check_name(_from_environment, "LITEVAE_BACKEND")


class _Choice(threading.local):
    forced: str | None = _from_environment


_choice = _Choice()
# The latest choice of any thread, for the compiler, which traces and guards a global on every version of torch,
# but a thread's own values (or a ContextVar's) not on 2.11.
_latest: str | None = _from_environment


def forced_backend() -> str | None:
    """What `use_backend` or the environment forces in this thread."""
    return _choice.forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator that this thread calls inside the ``with`` block.

    The backward pass of a call uses the backend of its forward pass, wherever it runs. Under `torch.compile`
    the choice is part of the compiled graph: another choice compiles anew, and of several threads' choices the
    latest counts.

    Args:
        name: ``"reference"`` (plain PyTorch), ``"native"`` (compiled C++/CUDA) or ``"triton"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: by an operator inside the block, if that backend cannot serve the call.
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


@functools.cache
def _find_why_no_cuda() -> str | None:
    assert core is not None
    if not cuda_built:
        return f"the core has no CUDA: {core.cuda_reason}"
    if not torch.cuda.is_available():
        return None  # what would serve one
    oldest = min(int(re.findall(r"\d+", name)[0]) for name in core.cuda_architectures.split())
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < oldest:
            return f"the core was built for sm_{oldest} and newer, and GPU {device} is sm_{major}{minor}"
    return None


@torch.compiler.assume_constant_result  # which must not be around a cache: the compiler would look into that
def _why_no_cuda() -> str | None:
    return _find_why_no_cuda()


def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type`; None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if core is None:
            return f"the compiled core did not load ({core_error}); install with `pip install .`"
        if device_type == "cpu":
            return None
        if device_type == "cuda":
            return _why_no_cuda()
        return f"the compiled core does not know device {device_type!r}"
    if not triton_installed:
        return "Triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and triton_interpreted):
        return None
    if device_type == "cpu":
        return "Triton runs on the CPU only with TRITON_INTERPRET=1 set before the first import"
    return f"the Triton kernels do not know device {device_type!r}"


def choose(device_type: str) -> str:
    """The backend that serves a call with tensors on `device_type`.

    Native first, then Triton on a GPU, then the reference. A function of its argument, of what was built and of
    `use_backend` alone, which `torch.compile` traces and guards.

    Raises:
        RuntimeError: a backend is forced and cannot serve the call; the message says why.
    """
    forced = _latest if torch.compiler.is_compiling() else _choice.forced
    if forced is not None:
        reason = why_not(forced, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot serve a {device_type} tensor: {reason}")
        return forced
    if why_not("native", device_type) is None:
        return "native"
    if device_type == "cuda" and triton_installed:
        return "triton"
    if device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_slow(device_type)
    return "reference"


@functools.cache
def _warn_slow(device_type: str) -> None:
    warnings.warn(
        f"litevae_kernels serves {device_type} tensors with plain PyTorch, several times slower than its "
        f"kernels: {why_not('native', device_type)}",
        RuntimeWarning,
        stacklevel=4,
    )
