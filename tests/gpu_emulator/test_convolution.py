"""The Triton convolution on the emulated tensor cores of each architecture, and what must be reported of it."""

import importlib
import random
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel_cases.conv3x3 import BF16, COVERING, Case, check
from kernel_cases.running import run_case
from ptx_emulator import build
from ptx_emulator.emulator import EmulatorError
from ptx_emulator.triton_driver import TritonKernels

NAMES = list(COVERING["triton"])
ARCHITECTURES = OLDEST, _, _, HOPPER, NEWEST = 80, 86, 89, 90, 120  # wgmma on Hopper alone, mma elsewhere


# Two blocks of input channels: copies and products are under way beside each other.
CONTROL = Case((1, 40, 16, 4, 5), BF16, skip=8, affine=True, silu=True, bias=BF16, residual=True)


@pytest.fixture(scope="session")
def kernels_of(triton_kernels: TritonKernels, build_cache: Path) -> Callable[[int], TritonKernels]:
    """Returns a function that returns the Triton kernels of an architecture, such as 80."""
    library = build.build_emulator(build_cache)
    others = {a: TritonKernels(library, triton_kernels.cache, a) for a in ARCHITECTURES if a != HOPPER}
    return {HOPPER: triton_kernels, **others}.__getitem__


@pytest.mark.parametrize("name", NAMES[::5])
@pytest.mark.parametrize("architecture", [OLDEST, NEWEST])
def test_other_architectures(kernels_of: Any, architecture: int, name: str) -> None:
    run_case(kernels_of(architecture), "conv3x3", COVERING["triton"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {HOPPER}))
def test_every_architecture(kernels_of: Any, architecture: int, name: str) -> None:
    run_case(kernels_of(architecture), "conv3x3", COVERING["triton"][name])


@pytest.mark.parametrize("architecture", [OLDEST, HOPPER])
def test_the_product_is_on_tensor_cores(kernels_of: Any, architecture: int, changed_ptx: Any) -> None:
    seen = changed_ptx(lambda ptx: ptx)
    run_case(kernels_of(architecture), "conv3x3", CONTROL)
    (ptx,) = seen
    assert ("wgmma.mma_async" if architecture == HOPPER else "mma.sync.aligned") in ptx


@pytest.fixture
def changed_ptx(
    monkeypatch: pytest.MonkeyPatch, emulator: Any
) -> Callable[[Callable[[str], str]], list[str]]:
    """Returns a function that takes a change of PTX, makes it before PTX is loaded, and returns a list of the PTX."""
    kernel = importlib.import_module("litevae_kernels.conv3x3.triton").conv3x3_kernel
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))  # Nothing is loaded yet.

    def change(function: Callable[[str], str]) -> list[str]:
        seen: list[str] = []
        load = type(emulator).load

        def load_changed(self: Any, ptx: bytes) -> int:
            seen.append(function(ptx.decode()))
            return load(self, seen[-1].encode())

        monkeypatch.setattr(type(emulator), "load", load_changed)
        return seen

    return change


def without(name: str) -> Callable[[str], str]:
    """Returns a function that takes all instructions of a name out of PTX."""

    def change(ptx: str) -> str:
        assert name in ptx
        return re.sub(rf"{re.escape(name)}[^;]*;", "", ptx)

    return change


def run_control(kernels: TritonKernels) -> bool:
    """Returns whether the result of `CONTROL` is right."""
    kernels.emulator.reset()
    try:
        check(kernels, random.Random(0), CONTROL)
    except AssertionError:
        return False
    return True


ARRIVING = "shared memory: access to the destination of an asynchronous copy before its wait"
# Architecture, instruction, and what is reported without it.
NEEDED = [
    (OLDEST, "cp.async.wait_group", ARRIVING),
    (HOPPER, "cp.async.wait_group", ARRIVING),
    (HOPPER, "wgmma.wait_group", "wgmma: use of a register before the wait for the product that writes it"),
    (HOPPER, "wgmma.fence", "wgmma: a register was written after the last wgmma.fence"),
    (HOPPER, "fence.proxy", "shared memory: read by a tensor core of a write without fence.proxy.async"),
]


@pytest.mark.parametrize(("architecture", "instruction", "report"), NEEDED)
def test_every_wait_and_fence_is_needed(
    kernels_of: Any, changed_ptx: Any, architecture: int, instruction: str, report: str
) -> None:
    changed_ptx(without(instruction))
    kernels = kernels_of(architecture)
    run_control(kernels)
    found = kernels.emulator.problems()
    assert any(line.startswith(report) for line in found), found


@pytest.mark.parametrize("architecture", [OLDEST, HOPPER])
def test_dropped_barriers_are_races(kernels_of: Any, architecture: int) -> None:
    kernels = kernels_of(architecture)
    with kernels.emulator.without_barriers():
        run_control(kernels)
    assert any("without a barrier" in line for line in kernels.emulator.problems())


def swapped_fragments(ptx: str) -> str:
    """Returns the PTX with the first two matrices of every ldmatrix in each other's place."""
    return re.sub(r"(ldmatrix\S*x4\.shared\.b16 \{)(%r\d+), (%r\d+)", r"\1\3, \2", ptx)


@pytest.mark.parametrize("architecture", [OLDEST, HOPPER])
def test_wrong_fragments_change_the_result(kernels_of: Any, changed_ptx: Any, architecture: int) -> None:
    changed_ptx(swapped_fragments)
    assert not run_control(kernels_of(architecture))


@pytest.mark.parametrize("architecture", [OLDEST, HOPPER])
def test_a_short_buffer_is_out_of_bounds(
    kernels_of: Any, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = kernels_of(architecture)
    allow = kernels.emulator.allow
    monkeypatch.setattr(kernels.emulator, "allow", lambda x, writable: allow(x[..., :-1], writable))
    with pytest.raises(EmulatorError, match="global memory: read out of bounds"):
        run_control(kernels)
