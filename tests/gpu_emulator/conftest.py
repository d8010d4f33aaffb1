"""The emulated GPU's kernels, built once per session and cached with pytest's cache."""

import os
from pathlib import Path

import pytest
from ptx_emulator import build
from ptx_emulator.cuda import CudaKernels
from ptx_emulator.emulator import Emulator
from ptx_emulator.triton_driver import TritonKernels


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
