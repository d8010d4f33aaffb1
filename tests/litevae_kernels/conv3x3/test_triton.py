"""The Triton convolution against PyTorch in float64, on a GPU or in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process that sets it.
There the device of the tests is the CPU, and here it is CUDA.
"""

import itertools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels import conv3x3, use_backend
from litevae_kernels.conv3x3 import gpu
from litevae_kernels.conv3x3.normed import norm_silu_conv3x3
from litevae_kernels.testing import arrange, assert_within_budget, poisoned_memory

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)
# The interpreter truncates to bfloat16 where a GPU rounds; float32 stands for it there.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16)
SHAPES = (  # N, C, C_out, H, W
    (1, 1, 1, 1, 1),
    (2, 3, 12, 5, 7),
    (1, 12, 3, 1, 23),
    (3, 32, 32, 9, 1),
    (2, 96, 20, 3, 4),
    (1, 40, 192, 13, 11),  # two tiles of pixels, and three of outputs, as in LiteVAE-M's widths
    (2, 16, 130, 16, 16),
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int, layout: str = "channels_last") -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    if len(shape) != 4:
        return x
    return arrange(x, layout)


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x with adjacent channels, and a weight, a bias and a residual in any layout."""
    n, c, o, h, w = shape
    options: Any = {"dtype": dtype, "device": device}
    if layout == "sliced":
        x = draw(n, c + 2, h + 1, w + 3, **options, seed=0)[:, 1 : 1 + c, 1:, 2 : 2 + w]
    else:
        x = draw(n, c, h, w, **options, seed=0)
        x = x[:1].expand(n, c, h, w) if layout == "expanded" else x
    weight = draw(o, c, 3, 3, **options, seed=1, layout=layout)
    return x, weight, draw(o, **options, seed=2), draw(n, o, h, w, **options, seed=3, layout=layout)


def check(
    y: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *more: int
) -> None:
    """Compares `y` with the convolution of the exact input `h`, which had `more` roundings in float32."""
    exact, magnitude = (
        F.conv2d(*(f(t.double()) for t in (h, weight)), padding=1) for f in (lambda t: t, torch.abs)
    )
    for term in (None if bias is None else bias[:, None, None], residual):
        if term is not None:
            exact, magnitude = exact + term.double(), magnitude + term.double().abs()
    # The activated input is rounded to the operand's dtype, which counts as many roundings in float32.
    rounding = round(torch.finfo(y.dtype).eps / torch.finfo(torch.float32).eps)
    operations = h.shape[1] * 9 + 2 + rounding + sum(more)
    assert_within_budget(y, exact, magnitude=magnitude, operations=operations)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced", "expanded"])
@torch.no_grad()
def test_convolution(dtype: torch.dtype, layout: str, device: str) -> None:
    for i, shape in enumerate(SHAPES):
        x, weight, bias, residual = problem(shape, dtype, device, layout)
        silu, has_bias, has_residual = (bool(i + 1 & bit) for bit in (1, 2, 4))
        arguments = (bias if has_bias else None, residual if has_residual else None)
        with poisoned_memory():
            y = gpu._convolve(x, None, None, weight, *arguments, silu)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == dtype
        check(y, F.silu(x.double()) if silu else x, weight, *arguments, 4)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_normalised_input(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros surround the normalised image, and a large mean costs no digits."""
    monkeypatch.setattr(gpu, "mode", "off")  # so that the kernel serves without a measurement
    shapes = [((2, 12, 3, 5, 7), 4), ((1, 96, 32, 12, 13), 32), ((2, 8, 16, 3, 3), 1)]
    for (shape, groups), affine, mean in itertools.product(
        shapes, (True, False), (0.0, 1e4 if dtype == torch.float32 else 100.0)
    ):
        x, weight, bias, residual = problem(shape, dtype, device, "channels_last")
        x = x + mean
        norm = [
            draw(shape[1], dtype=torch.float32, device=device, seed=seed) if affine else None
            for seed in (4, 5)
        ]
        with poisoned_memory():
            y = gpu.norm_forward(x, None, groups, *norm, 1e-6, weight, bias, residual)
        h = F.group_norm(x.double(), groups, *(None if t is None else t.double() for t in norm), 1e-6)
        # The slope and the difference of x and the mean are rounded, the exponential takes a few steps, and the
        # slope of SiLU is at most 1.1; a normalised value of 30 would be as wrong as 30 roundings of 1.
        largest = int(h.abs().max()) + 1
        check(y, F.silu(h), weight, bias, residual, 12 * largest)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 3, 23], ids=str)
@torch.no_grad()
def test_skip(channels: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is that of the concatenation, whose groups have channels of both; the skip has any layout."""
    monkeypatch.setattr(gpu, "mode", "off")
    x, weight, bias, residual = problem((2, 24, 16, 5, 6), dtype, device, "channels_last")
    one, two = x[:, :channels].contiguous(memory_format=torch.channels_last), x[:, channels:].contiguous()
    with poisoned_memory():
        y = gpu.norm_forward(one, two, 4, None, None, 1e-6, weight, bias, residual)
    check(y, F.silu(F.group_norm(x.double(), 4)), weight, bias, residual, 12 * 5)


@on_device
@torch.no_grad()
def test_no_images(device: str) -> None:
    x, weight, bias, _ = problem((0, 8, 16, 3, 3), torch.float16, device, "channels_last")
    assert gpu._convolve(x, None, None, weight, bias, None, False).shape == (0, 16, 3, 3)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "forced"])
@torch.no_grad()
def test_public_functions_on_a_gpu(
    measured: bool, monkeypatch: pytest.MonkeyPatch, check_graph_replay: Any
) -> None:
    """Both ways to turn the kernel on give results in the budget: eager, compiled and in a CUDA graph."""
    monkeypatch.setattr(gpu, "mode", "measure" if measured else "off")
    x, weight, bias, residual = problem((2, 64, 96, 17, 19), torch.bfloat16, "cuda", "channels_last")

    def plain() -> Tensor:
        return conv3x3(x, weight, bias, residual=residual, silu_input=True)

    def normed() -> Tensor:
        return norm_silu_conv3x3(x, 32, None, None, weight, bias, residual=residual)

    def run() -> None:
        for call, h in ((plain, x.double()), (normed, F.group_norm(x.double(), 32, eps=1e-6))):
            for y in (call(), torch.compile(call, fullgraph=True)()):
                check(y, F.silu(h), weight, bias, residual, 100)
        check_graph_replay(lambda: (plain(), normed()), lambda seed: x.normal_())

    if measured:
        run()
        assert len(gpu._winners) >= 2
    else:
        with use_backend("triton"):
            run()
