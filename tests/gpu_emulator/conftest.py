"""The emulated GPU's kernels, built once per session and cached with pytest's cache."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from ptx_emulator import build
from ptx_emulator.cuda import CudaKernels
from ptx_emulator.emulator import Emulator
from ptx_emulator.triton_driver import TritonKernels
from torch import Tensor

# The beginning of a kernel that reads the tensor at %rd1 and writes the one at %rd2.
HEADER = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 first, .param .u64 second)
{
  .reg .b32 %r<256>;
  .reg .b64 %rd<16>;
  .reg .pred %p<4>;
  ld.param.u64 %rd1, [first];
  ld.param.u64 %rd2, [second];
  mov.u32 %r200, %tid.x;
"""


@pytest.fixture(scope="session")
def build_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of what was built, which later sessions use again."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("gpu_emulator") if cache is not None else tmp_path_factory.mktemp("gpu_emulator")


@pytest.fixture(scope="session")
def emulator(build_cache: Path) -> Emulator:
    """Returns an emulator without kernels, for PTX of the test."""
    reason = build.why_no_emulator()
    if reason is not None:
        pytest.skip(reason)
    return Emulator(build.build_emulator(build_cache))


@pytest.fixture(scope="session")
def cuda_kernels(build_cache: Path) -> CudaKernels:
    """Returns the CUDA kernels on the emulator."""
    reason = build.why_no_core()
    if reason is not None:
        pytest.skip(reason)
    return CudaKernels(build.build_core(build_cache))


@pytest.fixture(scope="session")
def triton_kernels(build_cache: Path) -> TritonKernels:
    """Returns the Triton kernels on the emulator."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET leaves nothing to compile")
    reason = build.why_no_emulator()
    if reason is not None:
        pytest.skip(reason)
    return TritonKernels(build.build_emulator(build_cache), build_cache / "triton")


@pytest.fixture
def run_ptx(emulator: Emulator) -> Callable[..., list[str]]:
    """Returns a function that runs `HEADER` and a body on one cluster of blocks, and returns the problems."""

    def run(body: str, first: Tensor, second: Tensor, threads: int, blocks: int = 1) -> list[str]:
        module = emulator.load(f"{HEADER}{body}\n}}\n".encode())
        emulator.reset()
        emulator.allow(first, writable=False)
        emulator.allow(second, writable=True)
        pointers = [struct.pack("<Q", t.data_ptr()) for t in (first, second)]
        try:
            emulator.launch(
                module, "kernel", (blocks, 1, 1), (threads, 1, 1), 0, pointers, cluster=(blocks, 1, 1)
            )
        finally:
            emulator.forget()
        return emulator.problems()

    return run
