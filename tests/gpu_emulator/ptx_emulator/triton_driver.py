"""Runs the Triton kernels of litevae_kernels/<operator>/triton.py: Triton's compiler, and a driver that emulates."""

import importlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels.testing import poisoned_memory
from ptx_emulator.emulator import Emulator

PACKAGE = Path(importlib.import_module("litevae_kernels").__file__ or "").parent
OPERATORS = sorted(path.parent.name for path in PACKAGE.glob("*/triton.py"))
# struct's codes of the types of Triton's signatures.
CODES = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class TritonKernels:
    """The Triton kernels on the emulator.

    Args:
        library: result of `build.build_emulator`.
        cache: folder for compiled kernels, which holds nothing else: PTX stands where Triton expects a cubin.
        architecture: such as 90 for sm_90.
    """

    name = "triton"

    def __init__(self, library: Path, cache: Path, architecture: int = 90) -> None:
        self.emulator = Emulator(library)
        self.cache, self.architecture = cache, architecture
        self.scratch: list[Tensor] = []
        self.inputs: set[int] = set()  # addresses of storages that a call must not write

    def all_kernels(self) -> set[str]:
        modules = [importlib.import_module(f"litevae_kernels.{name}.triton") for name in OPERATORS]
        return {name for module in modules for name in vars(module) if name.endswith("_kernel")}

    def run(self, operator: str, function: str, *arguments: Any, written: Sequence[Tensor | None]) -> None:
        """Calls a function of an operator's triton.py; see `CudaKernels.run`."""
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime import driver

        module = importlib.import_module(f"litevae_kernels.{operator}.triton")
        outputs = {t.untyped_storage().data_ptr() for t in written if t is not None}
        self.inputs = {t.untyped_storage().data_ptr() for t in _tensors(arguments)} - outputs
        with pytest.MonkeyPatch.context() as patch, poisoned_memory():
            patch.setenv("TRITON_CACHE_DIR", str(self.cache))
            patch.setattr(driver, "_active", _Driver(self))
            # ptxas takes longer than the rest, and the emulator needs no machine code.
            patch.setattr(CUDABackend, "make_cubin", lambda self, source, *rest: source.encode())
            try:
                getattr(module, function)(*arguments)
            finally:
                self.emulator.forget()

    def launcher(self, source: Any, metadata: Any) -> Any:
        """Returns what Triton calls to launch a kernel."""
        signature = tuple(source.signature.values())

        def launch(*call: Any) -> None:
            x, y, z, _stream, module, _packed, _metadata, _enter, _exit, *arguments = call
            values = list(_flat(signature, arguments))
            self.emulator.forget()
            for _, value in values:
                if isinstance(value, Tensor):
                    self.emulator.allow(value, value.untyped_storage().data_ptr() not in self.inputs)
            packed = [_bits(kind, value) for kind, value in values]
            # Triton adds two pointers to scratch memory, which these kernels do not use.
            packed += [bytes(8)] * (len(self.emulator.parameters(module, metadata.name)) - len(packed))
            threads = 32 * metadata.num_warps
            self.emulator.launch(module, metadata.name, (x, y, z), (threads, 1, 1), metadata.shared, packed)

        return launch


class _Driver:
    """The part of a Triton driver that Triton's compiler and launches use."""

    def __init__(self, kernels: TritonKernels) -> None:
        self.utils, self.launcher_cls, self._kernels = self, kernels.launcher, kernels

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._kernels.architecture, 32)

    def get_current_device(self) -> int:
        return -self._kernels.architecture  # no GPU's number: Triton caches compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """Returns module, function, registers, spills and the largest number of threads.

        The function is the number of the emulator's module. Triton unloads modules, but not None.
        """
        return None, self._kernels.emulator.load(ptx), 0, 0, 1024


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _flat(signature: Sequence[Any], arguments: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yields type and value of each parameter of the PTX: constants have none, and tuples have one per element."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _bits(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    return struct.pack(f"<{CODES[kind]}", value)
