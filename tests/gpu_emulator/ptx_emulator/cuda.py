"""Runs the CUDA kernels through litevae_kernels/<operator>/native.py, its GPU branch, and the core's own launches."""

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ptx_emulator.emulator import Emulator

DEVICE = torch.device("cuda", 0)


class DeviceTensor:
    """A CPU tensor that says it is on a GPU, with as much of a tensor's interface as native.py uses.

    Kernels may access its memory once its address has been asked for.
    """

    device, is_cpu = DEVICE, False

    def __init__(self, tensor: Tensor, allow: Callable[[Tensor, bool], None], writable: bool) -> None:
        self.tensor, self._allow, self._writable = tensor, allow, writable
        self.shape, self.dtype, self.ndim = tensor.shape, tensor.dtype, tensor.ndim

    def stride(self, axis: int | None = None) -> Any:
        return self.tensor.stride() if axis is None else self.tensor.stride(axis)

    def data_ptr(self) -> int:
        self._allow(self.tensor, self._writable)
        return self.tensor.data_ptr()


def load_core(path: Path) -> ModuleType:
    """Returns the emulated core, beside the real one: pybind11 caches modules by their full names."""
    spec = importlib.util.spec_from_file_location("ptx_emulator.litevae_core", path)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    assert core.compiler == "emulator"
    return core


class CudaKernels:
    """The CUDA kernels on the emulator.

    Args:
        path: result of `build.build_core`.

    Attributes:
        scratch: the scratch memory of the last call, which began as NaN.
    """

    name = "cuda"

    def __init__(self, path: Path) -> None:
        self.core = load_core(path)
        self.emulator = Emulator(path)
        self.allow = self.emulator.allow
        self.scratch: list[Tensor] = []

    def all_kernels(self) -> set[str]:
        return self.emulator.entries()

    def run(self, operator: str, function: str, *arguments: Any, written: Sequence[Tensor | None]) -> None:
        """Calls a function of an operator's native.py.

        Args:
            operator: name of the folder.
            function: name in native.py.
            arguments: CPU tensors stand for tensors on the GPU.
            written: the tensors among `arguments` that the call may write.
        """
        module = importlib.import_module(f"litevae_kernels.{operator}.native")
        self.scratch = []

        def on_device(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [on_device(y) for y in x]
            if not isinstance(x, Tensor):
                return x
            return DeviceTensor(x, self.allow, any(x is y for y in written))

        def scratch_memory(size: int, device: torch.device) -> DeviceTensor:
            assert device == DEVICE
            self.scratch.append(torch.full((size,), 255, dtype=torch.uint8))
            return DeviceTensor(self.scratch[-1], self.allow, True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "core", self.core)
            patch.setattr(module, "scratch_memory", scratch_memory)
            patch.setattr(module, "device_guard", lambda device: contextlib.nullcontext())
            patch.setattr(module, "current_stream", lambda device: 0)
            try:
                getattr(module, function)(*map(on_device, arguments))
            finally:
                self.emulator.forget()
