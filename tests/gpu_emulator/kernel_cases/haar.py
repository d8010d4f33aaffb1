"""Haar analysis and synthesis.

Inputs are small integers, so float32 arithmetic is exact in any order, and results must be bit-identical.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_cases.poisoned import DTYPES, LAYOUTS, Poisoned
from kernel_cases.running import Kernels
from litevae_kernels.haar import reference
from litevae_kernels.haar.shapes import MODES, level_sizes

F32, F64, F16, BF16 = DTYPES


@dataclass(frozen=True)
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
    expanded: float = 0.0  # share of inputs with a stride of 0


def random_case(rng: random.Random) -> Case:
    def size() -> int:
        return rng.choice((8, 16, 24, 32, 40, 64)) if rng.random() < 0.5 else rng.randint(1, 67)

    shape = rng.randint(1, 3), rng.choice((1, 2, 3, 3, 4, 5)), size(), size()
    levels = rng.choice((1, 2, 3, 3, 4, 5, 7))
    may_reflect = all(1 not in s for s in level_sizes(*shape[2:], levels)[:-1])
    mode = rng.choice([m for m in MODES if m != "reflect" or may_reflect])
    dtypes = rng.choices(DTYPES, (4, 1, 3, 3), k=2)
    layouts = (rng.choice(LAYOUTS), rng.choice((*LAYOUTS, "", "")))
    if rng.random() < 0.5:
        dense = ("contiguous", "channels_last", "contiguous_sliced")
        layouts = (rng.choice(dense), rng.choice(dense))
    stacked, expanded = rng.random() < 0.7, rng.choice((0.0, 0.0, 0.3))
    return Case(rng.random() < 0.5, shape, levels, mode, stacked, *dtypes, *layouts, expanded)


def check(kernels: Kernels, rng: random.Random, case: Case) -> None:
    (n, c, height, width), levels, stacked = case.shape, case.levels, case.stacked
    sizes, scale = level_sizes(height, width, levels), rng.choice((0.5, 1.0))
    shapes = (
        [(n, 4 * c, *s) for s in sizes[1:]]
        if stacked
        else [(n, c, *sizes[-1])] + [(n, c, *s) for s in reversed(sizes[1:]) for _ in range(3)]
    )
    coeffs = [Poisoned(rng, s, case.coeff_dtype, case.coeff_layout or rng.choice(LAYOUTS)) for s in shapes]
    image = Poisoned(rng, case.shape, case.image_dtype, case.image_layout)
    for tensor in [image] if case.analysis else coeffs:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        tensor.view.copy_(torch.randint(-8, 9, tensor.view.shape, generator=generator))
        if rng.random() < case.expanded:
            axis = rng.randrange(4)
            tensor.view = tensor.view.narrow(axis, 0, 1).expand(tensor.view.shape)
    views = [t.view for t in coeffs]
    written = views if case.analysis else [image.view]
    function = "analysis" if case.analysis else "synthesis"
    arguments = (image.view, views, levels, case.mode, scale, stacked)
    kernels.run("haar", function, *arguments, written=written)
    for scratch in kernels.scratch:
        dtype = torch.float64 if torch.float64 in (case.image_dtype, case.coeff_dtype) else torch.float32
        assert not scratch.view(dtype).isnan().any(), "more scratch memory than the kernels use"
    options = (case.mode, scale, stacked, torch.float64, False)
    if case.analysis:
        expected = reference.analysis(image.view.double(), levels, *options)
    else:
        expected = [reference.synthesis([x.double() for x in views], height, width, *options)]
    for i, (got, want) in enumerate(zip(coeffs if case.analysis else [image], expected, strict=True)):
        _assert_equal(got, want, f"{function}, result {i}")


def _assert_equal(got: Poisoned, want: Tensor, what: str) -> None:
    actual = got.view.clone()
    assert torch.equal(actual, want.to(actual.dtype)), f"{what}: {(actual.double() - want).abs().max()} off"
    got.check_surroundings(what)


# Image layout, coefficient layout and number of channels for each kind of memory access (csrc/haar/plan.cuh).
_KINDS = {
    "any": ("transposed", "contiguous", 2),
    "rows": ("contiguous", "contiguous", 2),
    "planar": ("contiguous", "contiguous_sliced", 2),
    "channels": ("channels_last", "channels_last_sliced", 4),
    "pixels planar": ("contiguous", "channels_last", 3),
    "pixels interleaved": ("channels_last", "channels_last", 3),
    "unaligned planar": ("contiguous", "channels_last", 3),
    "unaligned interleaved": ("channels_last", "channels_last", 3),
}
# Kinds for rows to which no vectors are aligned.
_ODD = ("any", "rows", "unaligned planar", "unaligned interleaved")


def _covering_cuda() -> dict[str, Case]:
    cases = {}
    for kind, (image, coeffs, channels) in _KINDS.items():
        for i, (load, levels, analysis) in enumerate(
            (x, y, z) for x in DTYPES for y in (1, 2, 3) for z in (True, False)
        ):
            store = load if load == F64 else (F32, BF16, F16)[(i + levels) % 3]
            dtypes = (load, store) if analysis else (store, load)
            # Height: tiles inside and at the border, odd at every level. Width: rows of vectors that stay aligned,
            # or for the kinds without such rows an odd one.
            shape = (1 + i % 2, channels, 27, 43 if kind in _ODD else 40)
            mode = MODES[i % len(MODES)]
            name = f"{'analysis' if analysis else 'synthesis'} {kind} {str(load)[6:]} {levels}"
            cases[name] = Case(analysis, shape, levels, mode, kind != "planar", *dtypes, image, coeffs)
    return cases


def _covering_triton() -> dict[str, Case]:
    even, odd = (1, 3, 16, 24), (2, 2, 13, 21)
    cl = "channels_last"
    calls = {
        "fused fp32": (even, 2, True, F32, F32, "contiguous", "contiguous"),
        "fused bf16 packed": (even, 1, True, BF16, BF16, cl, cl),
        "fused fp32 to bf16 packed, all levels": (even, 3, True, F32, BF16, "contiguous", cl),
        "fused fp16, flat": ((1, 2, 8, 16), 1, False, F16, F16, "contiguous", "contiguous"),
        "odd fp32 to bf16": (odd, 1, True, F32, BF16, "contiguous", cl),
        "odd fp64": (odd, 1, False, F64, F64, "wild", "wild"),
    }
    return {
        f"{'analysis' if analysis else 'synthesis'} {name}": Case(
            analysis, shape, levels, "periodic", stacked, *dtypes
        )
        for name, (shape, levels, stacked, *dtypes) in calls.items()
        for analysis in (True, False)
    }


COVERING = {"cuda": _covering_cuda(), "triton": _covering_triton()}
