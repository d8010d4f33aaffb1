"""The CUDA Haar kernels without a GPU: g++ compiles them, and every thread of a grid runs in a loop on the CPU.

Inputs are small integers, so float32 arithmetic is exact in any order, and results must be bit-identical. All tensors
lie in memory filled with NaN: a read outside a tensor shows in the result, a write outside in the NaNs.
"""

import ctypes
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litevae_kernels.haar import reference
from litevae_kernels.haar.shapes import MODES, level_sizes

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of the core's codes
KINDS = ("any", "planar", "channels", "pixels_planar", "pixels_interleaved", "rows")
LAYOUTS = ("planar", "interleaved", "planar_sliced", "interleaved_sliced", "transposed", "misaligned", "wild")
SOURCE = Path(__file__).with_name("haar_cuda_on_host.cpp")


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("haar_cuda_on_host") / "haar_cuda_on_host.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.scratch_bytes.restype = ctypes.c_int64
    return loaded


class Poisoned:
    """A tensor of any strides in a buffer that is filled with NaN."""

    def __init__(self, rng: random.Random, shape: Sequence[int], dtype: torch.dtype, layout: str) -> None:
        order = {"planar": (3, 2, 1, 0), "interleaved": (1, 3, 2, 0), "transposed": (2, 3, 1, 0)}.get(
            layout.split("_")[0], (3, 2, 1, 0)
        )
        if layout == "wild":
            order = tuple(rng.sample(range(4), 4))
        strides, extent = [0] * 4, 1
        for axis in order:
            strides[axis] = extent
            extent *= shape[axis]
            if layout == "wild":
                extent += rng.randrange(3) * strides[axis]
            elif layout.endswith("sliced") and axis in (3, 2):
                extent += 8 * strides[axis]  # keeps vectors aligned
        offset = 33 if layout == "misaligned" else 32
        self.buffer = torch.full((extent + 64,), torch.nan, dtype=dtype)
        self.view = self.buffer.as_strided(list(shape), strides, offset)

    def fill(self, rng: random.Random) -> "Poisoned":
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        values = torch.randint(-8, 9, self.view.shape, generator=generator)
        self.view.copy_(values)
        return self

    def check(self, expected: Tensor, what: str) -> None:
        got = self.view.clone()
        assert torch.equal(got, expected.to(got.dtype)), (
            f"{what}: {(got.double() - expected).abs().max()} off"
        )
        self.view.fill_(torch.nan)
        assert bool(self.buffer.isnan().all()), f"{what}: written outside"


def bands_of(
    coeffs: Sequence[Tensor], levels: int, stacked: bool, order: Sequence[int]
) -> list[Tensor | None]:
    """Returns LL, H, V, D of each level, finest first. Stacked bands may have another `order` in memory."""
    if stacked:
        return [level.chunk(4, 1)[i] for level in coeffs for i in order]
    bands: list[Tensor | None] = []
    for level in range(1, levels + 1):
        first = 1 + 3 * (levels - level)
        bands += [coeffs[0] if level == levels else None, *coeffs[first : first + 3]]
    return bands


@dataclass
class Case:
    analysis: bool
    shape: tuple[int, int, int, int]
    levels: int
    mode: str
    stacked: bool
    image_dtype: torch.dtype
    coeff_dtype: torch.dtype
    image_layout: str
    coeff_layout: str  # empty: each tensor has its own
    order: tuple[int, ...] = (0, 1, 2, 3)  # order of stacked sub-bands
    expanded: float = 0.0  # share of inputs with a stride of 0


def random_case(rng: random.Random) -> Case:
    def size() -> int:
        return rng.choice((8, 16, 24, 32, 40, 64)) if rng.random() < 0.5 else rng.randint(1, 67)

    shape = rng.randint(1, 3), rng.choice((1, 2, 3, 3, 4, 5)), size(), size()
    levels = rng.choice((1, 2, 3, 3, 4, 5, 7))
    may_reflect = all(1 not in s for s in level_sizes(*shape[2:], levels)[:-1])
    mode = rng.choice([m for m in MODES if m != "reflect" or may_reflect])
    image_dtype, coeff_dtype = rng.choices(DTYPES, (4, 1, 3, 3), k=2)
    image_layout, coeff_layout = rng.choice(LAYOUTS), rng.choice((*LAYOUTS, "", ""))
    if rng.random() < 0.5:
        dense = ("planar", "interleaved", "planar_sliced")
        image_layout, coeff_layout = rng.choice(dense), rng.choice(dense)
    analysis, stacked = rng.random() < 0.5, rng.random() < 0.7
    case = Case(analysis, shape, levels, mode, stacked, image_dtype, coeff_dtype, image_layout, coeff_layout)
    case.expanded = rng.choice((0.0, 0.0, 0.3))
    if rng.random() < 0.15:
        case.order = tuple(rng.sample(range(4), 4))
    return case


# Image layout, coefficient layout and number of channels that select each kind of kernel.
MADE_FOR = {
    "any": ("transposed", "planar", 2),
    "planar": ("planar", "planar_sliced", 2),
    "channels": ("interleaved", "interleaved_sliced", 4),
    "pixels_planar": ("planar", "interleaved", 3),
    "pixels_interleaved": ("interleaved", "interleaved", 3),
    "rows": ("planar", "misaligned", 2),
}


def case_for(rng: random.Random, kind: str, analysis: bool, load: torch.dtype, store: torch.dtype) -> Case:
    image_layout, coeff_layout, channels = MADE_FOR[kind]
    shape = 2, channels, rng.choice((16, 24, 43)), rng.choice((32, 40, 64))
    dtypes = (load, store) if analysis else (store, load)
    return Case(analysis, shape, rng.randint(1, 3), "periodic", True, *dtypes, image_layout, coeff_layout)


def check_case(on_host, rng: random.Random, case: Case) -> tuple[set[str], int]:
    """Returns the kernels that ran and the number of threads on the slow path."""
    (n, c, height, width), levels, mode, stacked = case.shape, case.levels, case.mode, case.stacked
    image_dtype, coeff_dtype, analysis = case.image_dtype, case.coeff_dtype, case.analysis
    sizes, scale = level_sizes(height, width, levels), rng.choice((0.5, 1.0))
    shapes = (
        [(n, 4 * c, *s) for s in sizes[1:]]
        if stacked
        else [(n, c, *sizes[-1])] + [(n, c, *s) for s in reversed(sizes[1:]) for _ in range(3)]
    )
    coeffs = [Poisoned(rng, s, coeff_dtype, case.coeff_layout or rng.choice(LAYOUTS)) for s in shapes]
    image = Poisoned(rng, (n, c, height, width), image_dtype, case.image_layout)
    for tensor in [image] if analysis else coeffs:
        tensor.fill(rng)
        if rng.random() < case.expanded:
            axis = rng.randrange(4)
            tensor.view = tensor.view.narrow(axis, 0, 1).expand(tensor.view.shape)

    order = case.order
    codes = DTYPES.index(image_dtype), DTYPES.index(coeff_dtype)
    size = (ctypes.c_int64 * 4)(n, c, height, width)
    scratch_dtype = torch.float64 if torch.float64 in (image_dtype, coeff_dtype) else torch.float32
    elements = on_host.scratch_bytes(size, levels, *codes) // scratch_dtype.itemsize
    scratch = torch.full((elements + 16,), torch.nan, dtype=scratch_dtype)
    tensors: list[int] = []
    for tensor in (image.view, *bands_of([t.view for t in coeffs], levels, stacked, order)):
        tensors += [0] * 5 if tensor is None else [tensor.data_ptr(), *tensor.stride()]
    report = (ctypes.c_int64 * 4)()
    on_host.run_haar(
        int(analysis),
        size,
        levels,
        MODES.index(mode),
        ctypes.c_double(0.5 * scale),
        *codes,
        (ctypes.c_int64 * len(tensors))(*tensors),
        ctypes.c_void_p(scratch.data_ptr()),
        report,
    )
    assert report[0] == 0, f"{report[0]} misaligned vector accesses"
    assert bool(scratch[elements:].isnan().all()), "written beyond the scratch memory"
    assert not scratch[:elements].isnan().any(), "more scratch memory than the kernels use"
    f64 = torch.float64
    if analysis:
        expected = reference.analysis(image.view.double(), levels, mode, scale, stacked, f64, False)
        for i, (got, want) in enumerate(zip(coeffs, expected, strict=True)):
            if stacked:
                want = torch.cat([want.chunk(4, 1)[order.index(j)] for j in range(4)], 1)
            got.check(want, f"tensor {i}")
    else:
        wide = [t.view.double() for t in coeffs]
        if stacked:
            wide = [torch.cat([t.chunk(4, 1)[i] for i in order], 1) for t in wide]
        expected_image = reference.synthesis(wide, height, width, mode, scale, stacked, f64, False)
        image.check(expected_image, "image")
    return {kind for bit, kind in enumerate(KINDS) if report[3] >> bit & 1}, report[2]


@pytest.mark.parametrize("seed", range(25))
def test_equals_reference(on_host, seed: int) -> None:
    for i in range(80):
        rng = random.Random(1000 * seed + i)
        case = random_case(rng)
        try:
            check_case(on_host, rng, case)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {i}: {case}: {error}") from error


@pytest.mark.parametrize("load", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("analysis", [True, False])
def test_each_kernel(on_host, analysis: bool, kind: str, load: torch.dtype) -> None:
    rng = random.Random(0)
    stores = [torch.float64] if load == torch.float64 else [x for x in DTYPES if x != torch.float64]
    for store in stores * 4:
        kinds, slow_threads = check_case(on_host, rng, case_for(rng, kind, analysis, load, store))
        if load == torch.float64 and kind != "planar":
            assert not kinds  # every thread took the slow path
            assert slow_threads
        else:
            assert kinds == {kind}
