"""Fixtures of the tests that run CUDA kernels on the CPU."""

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of the core's codes
LAYOUTS = (
    "contiguous",
    "channels_last",
    "contiguous_sliced",
    "channels_last_sliced",
    "contiguous_pitched",
    "channels_last_pitched",
    "transposed",
    "wild",
)


class Poisoned:
    """A tensor of any strides in a buffer of NaN, which exposes accesses outside the tensor."""

    def __init__(self, rng: random.Random, shape: Sequence[int], dtype: torch.dtype, layout: str) -> None:
        order = [3, 2, 1, 0]  # axes, innermost first
        if layout.startswith("channels_last"):
            order = [1, 3, 2, 0]
        elif layout == "transposed":
            order = [2, 3, 1, 0]
        elif layout == "wild":
            rng.shuffle(order)
        strides, extent = [0] * 4, 1
        for axis in order:
            if axis == 0 and layout.endswith("pitched"):
                extent += 1  # Images begin at any element.
            strides[axis] = extent
            extent *= shape[axis]
            if layout == "wild":
                extent += rng.randrange(3) * strides[axis]
            elif layout.endswith("sliced"):  # Vectors stay aligned.
                extent += 8 * strides[axis] if axis in (1, order[0]) else 0
        self.offset = 32 if layout != "wild" else 33
        self.buffer = torch.full((extent + 64,), torch.nan, dtype=dtype)
        self.view = self.buffer.as_strided(list(shape), strides, self.offset)

    def check_surroundings(self, what: str) -> None:
        """Asserts that nothing was written outside the view, and overwrites it."""
        self.view.fill_(torch.nan)
        assert bool(self.buffer.isnan().all()), f"{what}: written outside the tensor"


def numbers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Returns ten numbers per tensor (see blocks_on_host.h); vectors become (1, C, 1, 1)."""
    flat: list[int] = []
    for t in tensors:
        if t is None:
            flat += [0] * 10
            continue
        t = t[None, :, None, None] if t.ndim == 1 else t
        flat += [t.data_ptr(), DTYPES.index(t.dtype), *t.shape, *t.stride()]
    return (ctypes.c_int64 * len(flat))(*flat)


@pytest.fixture(scope="session")
def on_host(tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """Returns a function that compiles a file of this folder and returns its library with the helpers above."""

    def build(name: str) -> SimpleNamespace:
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        library = tmp_path_factory.mktemp(name) / f"{name}.so"
        flags = [
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
        ]
        source = Path(__file__).with_name(f"{name}.cpp")
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.forward.restype = loaded.backward.restype = ctypes.c_int64
        loaded.kernels_that_ran.restype = ctypes.c_char_p
        return SimpleNamespace(
            core=loaded, Poisoned=Poisoned, numbers=numbers, DTYPES=DTYPES, LAYOUTS=LAYOUTS
        )

    return build


@pytest.fixture(scope="session")
def check_random_cases() -> Callable[..., None]:
    """Returns a function that checks 40 random cases of a seed, and names the case in the message of a failure."""

    def run(
        host: SimpleNamespace,
        seed: int,
        random_case: Callable[[random.Random, SimpleNamespace], object],
        check: Callable[[SimpleNamespace, random.Random, object], object],
    ) -> None:
        for i in range(40):
            rng = random.Random(1000 * seed + i)
            case = random_case(rng, host)
            try:
                check(host, rng, case)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {i}: {case}: {error}") from error

    return run
