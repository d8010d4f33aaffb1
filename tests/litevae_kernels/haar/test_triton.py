"""The Triton kernels in Triton's interpreter on the CPU, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process where it is
set. There the tests use the CPU; here they use CUDA.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import pywt
import torch
from torch import Tensor

from litevae_kernels.haar import reference
from litevae_kernels.haar.shapes import MODES, level_sizes

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("litevae_kernels.haar.triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)

CASES = 4  # cases per group; on a GPU almost every case compiles its own kernels
KINDS = 16  # kinds of layouts and types on a GPU
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "pitched",
    "channel_sliced",
    "transposed",
    "gaps",
    "misaligned",
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time depends on the number of programs, not on their size."""
    if INTERPRETED:
        for name in ("BLOCK", "WARP"):
            monkeypatch.setattr(kernels, name, 256)


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    pitch = (w + 15) // 16 * 16
    return {
        "contiguous": (c * h * w, h * w, w, 1),
        "misaligned": (c * h * w, h * w, w, 1),
        "channels_last": (h * w * c, 1, w * c, c),
        "sliced": (c * (h + 1) * (w + 3), (h + 1) * (w + 3), w + 3, 1),
        "pitched": (c * h * pitch, h * pitch, pitch, 1),
        "channel_sliced": (h * w * (c + 2), 1, w * (c + 2), c + 2),
        "transposed": (c * h * w, h * w, 1, h),
        "gaps": (2 * c * h * w, 2 * h * w, 2 * w, 2),
        "expanded": (0, h, 1, 0),
    }[layout]


class Poisoned:
    """A tensor of any layout inside a larger buffer that is filled with NaN."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> None:
        strides = strides_of(shape, layout)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        margin = 65 if layout == "misaligned" else 64
        self.buffer = torch.full((extent + 2 * margin,), float("nan"), dtype=dtype, device=device)
        self.view = self.buffer.as_strided(shape, strides, margin)

    def check_written_inside_only(self) -> None:
        assert not self.view.isnan().any(), "not all of the output was written"
        self.view.fill_(float("nan"))
        assert self.buffer.isnan().all(), "something was written outside the output"


def filled(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    out = Poisoned(shape, layout, dtype, device).view
    if layout == "expanded":
        out[:1, :, :, :1] = torch.randn(1, *shape[1:3], 1)
    else:
        out.copy_(torch.randn(shape))
    return out


def check(out: Tensor, exact: Tensor, magnitude: Tensor, roundings: int, accumulate: torch.dtype) -> None:
    """Compares within the rounding budget.

    Each arithmetic rounding costs half a step of `magnitude`, the sum of the terms' absolute values. The store costs
    half a step of the result.
    """
    budget = roundings * 0.5 * torch.finfo(accumulate).eps * magnitude.double()
    store = torch.finfo(out.dtype)
    to_bfloat16 = INTERPRETED and out.dtype == torch.bfloat16  # the interpreter truncates
    steps = 1.0 if to_bfloat16 else 0.5
    budget += steps * store.eps * (exact.abs() + budget) + store.smallest_normal * store.eps
    if accumulate == torch.float64 and out.dtype in (torch.float16, torch.bfloat16):
        budget += torch.finfo(torch.float32).eps * exact.abs()  # the conversion goes through float32
    error = (out.double() - exact).abs()
    assert (error <= budget).all(), f"{(error / budget).max().item()} times the budget"


def magnitudes(image: Tensor, levels: int, mode: str, scale: float, stacked: bool) -> list[Tensor]:
    """Returns a bound of each coefficient's sum of absolute terms: the LL of the absolute image at its level."""
    out = reference.analysis(image.abs(), levels, mode, scale, True, torch.float64, False)
    c = image.shape[1]
    bounds = [x[:, :c] for x in out]
    if stacked:
        return [x.repeat(1, 4, 1, 1) for x in bounds]
    return [bounds[-1]] + [x for x in reversed(bounds) for _ in range(3)]


def draw(seed: int, coeff_shapes: Any) -> dict[str, Any]:
    r = random.Random(seed)
    levels = r.randint(1, 5)
    while True:
        if r.random() < 0.6:  # sizes for the fused passes
            step = 1 << r.randint(1, min(levels, 4))
            height, width = (step * r.randint(1, max(1, 67 // step)) for _ in range(2))
        else:
            height, width = r.randint(1, 67), r.randint(1, 67)
        mode = r.choice(MODES)
        if mode != "reflect" or all(1 not in s for s in level_sizes(height, width, levels)[:-1]):
            break
    # The rest is what kernels are compiled for, which on a GPU takes most of the time: there cases share a few choices.
    if not INTERPRETED:
        r = random.Random(seed % KINDS)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    image_dtype = r.choice(dtypes)
    stacked = r.random() < 0.6
    shape = (r.randint(1, 2), r.choice((1, 2, 3, 3, 4, 5)), height, width)
    shapes = coeff_shapes(*shape, levels, stacked)
    one = r.choice(LAYOUTS)
    mixed = r.random() < 0.3
    return {
        "shape": shape,
        "levels": levels,
        "mode": mode,
        "scale": r.choice((1.0, 0.5)),
        "stacked": stacked,
        "image_dtype": image_dtype,
        "coeff_dtype": r.choice((image_dtype, *dtypes)),
        "image_layout": r.choice(LAYOUTS),
        "coeff_shapes": shapes,
        "stacked_shapes": coeff_shapes(*shape, levels, True),
        "coeff_layouts": [r.choice(LAYOUTS) if mixed else one for _ in shapes],
        "expanded": r.random() < 0.15,
    }


def each_case(coeff_shapes: Any, group: int, run: Callable[[dict[str, Any]], None]) -> None:
    for seed in range(group * CASES, (group + 1) * CASES):
        torch.manual_seed(seed)
        case = draw(seed, coeff_shapes)
        try:
            run(case)
        except Exception as error:
            error.add_note(f"seed {seed}: {case}")
            raise


def check_analysis(device: str, case: dict[str, Any]) -> None:
    options = (case["levels"], case["mode"], case["scale"], case["stacked"])
    layout = "expanded" if case["expanded"] else case["image_layout"]
    image = filled(case["shape"], layout, case["image_dtype"], device)
    outputs = [
        Poisoned(s, layout, case["coeff_dtype"], device)
        for s, layout in zip(case["coeff_shapes"], case["coeff_layouts"], strict=True)
    ]
    kernels.analysis(image, [x.view for x in outputs], *options)

    exact = reference.analysis(image.double(), *options, torch.float64, False)
    accumulate = torch.float64 if torch.float64 in (image.dtype, case["coeff_dtype"]) else torch.float32
    for out, want, bound in zip(outputs, exact, magnitudes(image.double(), *options), strict=True):
        check(out.view, want, bound, 3 * case["levels"], accumulate)
        out.check_written_inside_only()


def check_synthesis(device: str, case: dict[str, Any]) -> None:
    options = (case["levels"], case["mode"], case["scale"], case["stacked"])
    coeffs = [filled(s, x, case["coeff_dtype"], device)
              for s, x in zip(case["coeff_shapes"], case["coeff_layouts"], strict=True)]  # fmt: skip
    if case["expanded"]:
        coeffs[-1] = filled(case["coeff_shapes"][-1], "expanded", case["coeff_dtype"], device)
    output = Poisoned(case["shape"], case["image_layout"], case["image_dtype"], device)
    kernels.synthesis(output.view, coeffs, *options)

    def gradient(grads: list[Tensor]) -> Tensor:
        image = torch.zeros(case["shape"], dtype=torch.float64, device=device, requires_grad=True)
        out = reference.analysis(image, *options, torch.float64, False)
        return torch.autograd.grad(out, image, [g.double() for g in grads])[0]

    # The sum of the absolute values of a sample's terms: all sub-bands add up in LL, whose signs are all plus.
    bounds = [torch.zeros(x.shape, dtype=torch.float64, device=device) for x in coeffs]
    if case["stacked"]:
        for bound, x in zip(bounds, coeffs, strict=True):
            bands = x.double().abs().chunk(4, 1)
            bound[:, : bands[0].shape[1]] = bands[0] + bands[1] + bands[2] + bands[3]
        magnitude = gradient(bounds)
    else:
        _, c, *size = case["shape"]
        stacked = [torch.zeros(s, dtype=torch.float64, device=device)
                   for s in case["stacked_shapes"]]  # fmt: skip
        stacked[-1][:, :c] = coeffs[0].double().abs()
        for i, x in enumerate(coeffs[1:]):
            stacked[case["levels"] - 1 - i // 3][:, :c] += x.double().abs()
        magnitude = reference.synthesis(
            stacked, *size, case["mode"], case["scale"], True, torch.float64, False
        )
    accumulate = torch.float64 if torch.float64 in (output.view.dtype, case["coeff_dtype"]) else torch.float32
    check(output.view, gradient(coeffs), magnitude, 6 * case["levels"], accumulate)
    output.check_written_inside_only()


@on_device
@pytest.mark.parametrize("group", range(12))
def test_analysis_equals_the_reference(coeff_shapes: Any, device: str, group: int) -> None:
    each_case(coeff_shapes, group, lambda case: check_analysis(device, case))


@on_device
@pytest.mark.parametrize("group", range(12))
def test_synthesis_equals_the_gradient_of_the_reference(coeff_shapes: Any, device: str, group: int) -> None:
    each_case(coeff_shapes, group, lambda case: check_synthesis(device, case))


@on_device
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width", "levels"), [(16, 24, 3), (13, 22, 2), (20, 9, 3), (3, 5, 1)])
def test_analysis_equals_pywavelets(
    coeff_shapes: Any, device: str, mode: str, height: int, width: int, levels: int
) -> None:
    torch.manual_seed(height)
    image = torch.randn(2, 2, height, width, dtype=torch.float64, device=device)
    shapes = coeff_shapes(2, 2, height, width, levels, False)
    out = [torch.full(s, float("nan"), dtype=torch.float64, device=device) for s in shapes]
    kernels.analysis(image, out, levels, mode, 1.0, False)
    theirs = pywt.wavedec2(image.cpu().numpy(), "haar", mode=mode, level=levels)
    flat = [theirs[0], *(band for level in theirs[1:] for band in level)]
    for got, want in zip(out, flat, strict=True):
        # PyWavelets multiplies by 1/sqrt(2) twice per level.
        torch.testing.assert_close(got.cpu(), torch.from_numpy(want), rtol=0, atol=2e-15 * 2**levels * levels)


@on_device
def test_positions_beyond_int32_use_int64(
    coeff_shapes: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "beyond_int32", lambda count: True)
    for layout in ("contiguous", "channels_last"):
        for height, width in ((8, 16), (5, 7)):
            image = filled((2, 5, height, width), layout, torch.float32, device)
            shapes = coeff_shapes(2, 5, height, width, 2, True)
            out = [Poisoned(s, layout, torch.float32, device) for s in shapes]
            kernels.analysis(image, [x.view for x in out], 2, "symmetric", 0.5, True)
            exact = reference.analysis(image.double(), 2, "symmetric", 0.5, True, torch.float64, False)
            for got, want in zip(out, exact, strict=True):
                torch.testing.assert_close(got.view.double(), want, rtol=0, atol=1e-5)


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (0, 3, 7, 5)])
def test_nothing_to_do(coeff_shapes: Any, device: str, shape: tuple[int, ...]) -> None:
    n, c, height, width = shape
    image = torch.empty(shape, device=device)
    out = [torch.empty(s, device=device) for s in coeff_shapes(n, c, height, width, 2, True)]
    kernels.analysis(image, out, 2, "symmetric", 0.5, True)
    kernels.synthesis(image, out, 2, "symmetric", 0.5, True)


@on_device
def test_infinities_stay_where_they_belong(coeff_shapes: Any, device: str) -> None:
    image = torch.zeros(1, 1, 5, 7, device=device)
    image[..., 2, 2] = float("inf")
    shapes = coeff_shapes(1, 1, 5, 7, 1, True)
    out = [torch.empty(s, device=device) for s in shapes]
    kernels.analysis(image, out, 1, "zero", 1.0, True)
    want = reference.analysis(image, 1, "zero", 1.0, True, torch.float32, False)
    assert torch.equal(out[0], want[0])
    back = torch.empty_like(image)
    coeffs = [torch.zeros(s, device=device) for s in shapes]
    coeffs[0][:, 0, 1, 1] = float("inf")
    kernels.synthesis(back, coeffs, 1, "zero", 1.0, True)
    assert torch.equal(back, reference.synthesis(coeffs, 5, 7, "zero", 1.0, True, torch.float32, False))
