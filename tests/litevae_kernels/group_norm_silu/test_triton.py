"""The Triton kernels in Triton's interpreter on the CPU, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process that sets it.
There the device of the tests is the CPU, and here it is CUDA.
"""

import os
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("litevae_kernels.group_norm_silu.triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)

CASES = 13  # per test
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (  # N, C, C_skip, groups, H, W; few groups, because the interpreter's time grows with the programs
    (1, 1, 0, 1, 1, 1),
    (3, 4, 0, 4, 1, 1),  # one value per group
    (2, 6, 0, 1, 5, 7),
    (1, 8, 0, 8, 13, 11),
    (2, 16, 0, 2, 16, 16),
    (1, 24, 0, 3, 9, 32),
    (1, 24, 16, 8, 3, 5),  # groups of 5, one of them across both
    (1, 12, 8, 4, 8, 8),
    (2, 5, 2, 1, 6, 4),
    (1, 3, 37, 2, 17, 2),
    (3, 7, 0, 7, 1, 23),
    (1, 160, 0, 4, 4, 8),
    (2, 2, 0, 2, 43, 19),
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


def poisoned(like: Tensor | None, channels: int | None = None) -> Tensor | None:
    """Returns NaN with the shape, dtype and order of `like`, or with another number of channels.

    Under the interpreter float32 replaces bfloat16, because the interpreter truncates where a GPU rounds.
    """
    if like is None:
        return None
    dtype = torch.float32 if INTERPRETED and like.dtype == torch.bfloat16 else like.dtype
    if like.ndim == 1:
        return torch.full(like.shape, float("nan"), dtype=dtype, device=like.device)
    n, c, h, w = like.shape
    channels_last = like.stride(1) == 1 and c > 1
    shape = (n, c if channels is None else channels, h, w)
    out = torch.full(shape, float("nan"), dtype=dtype, device=like.device)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double()


def exact(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, list[Tensor | None], Tensor, Tensor]:
    """Returns y, the four gradients, the normalised input and rstd from PyTorch's own operators in float64."""
    inputs = [double(t) for t in (x, skip, weight, bias)]
    for t in inputs:
        if t is not None:
            t.requires_grad_()
    first, second, w, b = inputs
    assert first is not None
    joined = first if second is None else torch.cat([first, second], 1)
    n = joined.shape[0]
    # PyTorch's group_norm subtracts squares, which costs digits at a large mean even in float64. Subtracting the mean
    # of a group changes neither its value nor its gradients.
    mean = joined.detach().reshape(n, groups, -1).mean(2, keepdim=True)
    centred = (joined.reshape(n, groups, -1) - mean).reshape(joined.shape)
    # torch.group_norm accepts one value per group, which F.group_norm refuses. Weight and bias are applied by hand,
    # because torch 2.11 has no gradient where one of them is missing.
    z = torch.group_norm(centred, groups, None, None, eps)
    z = z if w is None else z * w[:, None, None]
    z = z if b is None else z + b[:, None, None]
    y = F.silu(z)
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad.double()))
    gradients = [None if t is None else next(found) for t in inputs]
    values = centred.detach().reshape(n, groups, -1)
    rstd = (values.square().mean(2) + eps).rsqrt()
    return y.detach(), gradients, values * rstd[..., None], rstd


def run(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
) -> list[Tensor | None]:
    """Returns y, the statistics and the four gradients."""
    y = poisoned(x, grad.shape[1])
    stats = torch.full((x.shape[0], groups, 2), float("nan"), dtype=torch.float64, device=x.device)
    gradients = [poisoned(t) for t in (x, skip, weight, bias)]
    kernels.forward(x, skip, weight, bias, y, stats, groups, eps)
    kernels.backward(grad, x, skip, weight, bias, stats, *gradients, groups)
    return [y, stats, *gradients]


def check(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
) -> None:
    """Compares with PyTorch, within bounds of first order in half a unit in the last place.

    The bounds use the maxima X of the normalised input, W and B of the parameters, Z = X W + B of SiLU's input, and G
    of the gradient.

    A chunk's mean comes from up to S additions at one place of the tile, then of up to P places: S + P + 4 roundings
    of differences of at most 2 X. Squares are at most S + 1 times what is left of them, after S products and
    additions and a subtraction, then P more places; rstd has half of the variance's error. z has six roundings and
    SiLU (whose slope is at most 1.1) eight, which makes the roundings of y, of magnitude Z.
    The slope of SiLU changes by at most 0.5 |z's error| and has 12 roundings of its own, of magnitude 1 + Z; the sums
    add S + P + 1, the one with the normalised input that one's as well. x's gradient has all of those, and
    the magnitudes 1, 1 of the mean and X^2 of the projection, times W rstd.
    """
    y, stats, *gradients = run(grad, x, skip, weight, bias, groups, eps)
    want, want_gradients, normal, rstd = exact(grad, x, skip, weight, bias, groups, eps)
    s = kernels.MAX_STEPS
    p = min(triton.next_power_of_2(x.shape[2] * x.shape[3]), kernels.TILE)
    largest = normal.abs().max().item()
    w = 1.0 if weight is None else weight.abs().max().item()
    z = largest * w + (0.0 if bias is None else bias.abs().max().item())
    forward = 2 * (s + p + 4) + ((s + 1) * (2 * s + 4) + p + 6) // 2 + 14
    sums = forward // 2 + 12 + s + p + 1
    assert y is not None
    assert_within_budget(y, want, magnitude=1.1 * z, operations=forward)
    assert stats is not None
    assert_within_budget(
        stats[..., 1].to(rstd.dtype) / rstd if x.dtype == torch.float64 else (stats[..., 1] / rstd).float(),
        torch.ones_like(rstd), magnitude=1, operations=forward,
    )  # fmt: skip
    g = grad.double().abs()
    each = 1.1 * g.max().item() * (1 + z)
    summed = 1.1 * g.sum((0, 2, 3)).max().item() * (1 + z)
    bounds = [(rstd.max().item() * w * each * (2 + largest + largest**2), sums + 2 * forward + 8)] * 2
    bounds += [(summed * largest, sums + forward + 1), (summed, sums)]
    for actual, gradient, (magnitude, operations) in zip(gradients, want_gradients, bounds, strict=True):
        assert (actual is None) == (gradient is None)
        if actual is not None:
            if x.dtype != torch.float64:
                actual = actual.to(min(actual.dtype, torch.float32, key=lambda dtype: dtype.itemsize))
            assert_within_budget(actual, gradient, magnitude=magnitude, operations=operations)


def draw(seed: int, device: str) -> tuple[Any, ...]:
    # The choices decide which kernels are compiled. On a GPU that takes most of the time, so all shapes share a few.
    r = random.Random(seed if INTERPRETED else seed // len(SHAPES))
    torch.manual_seed(seed)
    n, c, c_skip, groups, h, w = SHAPES[seed % len(SHAPES)]
    dtype = r.choice(DTYPES) if INTERPRETED else DTYPES[seed // len(SHAPES) % len(DTYPES)]
    # half precision would keep only the mean, and no type is wider than float64
    mean = r.choice((0, 0, 3, 1e4, 1e6)) if dtype == torch.float32 else r.choice((0, 0, 3))
    spread = 10 ** r.uniform(-1, 1)

    def tensor(channels: int, offset: float) -> Tensor:
        values = torch.randn(n, channels, h, w, dtype=torch.float64) * spread + offset
        return arrange(values.to(dtype).to(device), r.choice((*LAYOUTS, "channels_last", "channels_last")))

    def parameter(offset: float) -> Tensor | None:
        if r.random() < 0.2:
            return None
        values = (torch.randn(2 * (c + c_skip)) + offset).to(r.choice((dtype, *DTYPES))).to(device)
        return values[::2] if r.random() < 0.3 else values[: c + c_skip]

    skip = tensor(c_skip, -mean) if c_skip else None
    x = tensor(c, mean)
    return tensor(c + c_skip, 0), x, skip, parameter(1), parameter(0), groups, r.choice((1e-6, 1e-5, 0.1))


@on_device
@pytest.mark.parametrize("group", range(8))
def test_equals_pytorch_in_float64(device: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(group * CASES, (group + 1) * CASES):
        with monkeypatch.context() as patch:
            # several chunks, or several tiles per chunk, where the sizes for a GPU would give a single tile
            patch.setattr(
                kernels, "TILE", (512, 1024, 256)[seed % 3] if INTERPRETED else (256, 2048)[group % 2]
            )
            for name in ("PROGRAMS", "SUMMING_PROGRAMS"):
                patch.setattr(kernels, name, (1, 4, 10**9)[seed // 13 % 3])
            patch.setattr(kernels, "SUMMED_STEPS", (1, 4)[seed // 7 % 2])
            patch.setattr(kernels, "MAX_STEPS", 4)
            case = draw(seed, device)
            try:
                check(*case)
            except Exception as error:
                error.add_note(f"seed {seed}: {[(t.shape, t.stride(), t.dtype) for t in case[:2]]}")
                raise


@on_device
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_large_means(device: str, format: torch.memory_format) -> None:
    torch.manual_seed(1)
    x = (torch.randn(1, 8, 24, 24, dtype=torch.float64) + 1e6).float().to(device, memory_format=format)
    x[:, 4:] += 3e5  # a group of its own
    check(torch.randn_like(x), x, None, None, None, 2, 1e-6)


@on_device
def test_an_outlier_as_the_shift(device: str) -> None:
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(device) * 1e-3
    x[..., 0, 0] = 1000
    check(torch.ones_like(x), x, None, None, None, 4, 1e-6)


@on_device
def test_extreme_activations(device: str) -> None:
    """SiLU is -0 (not NaN) at -1000 and 1000 at 1000, with slopes 0 and 1."""
    bias = torch.tensor([-1000.0, 1000.0, -100.0, 88.0], device=device)
    x = torch.zeros(1, 4, 2, 2, device=device)
    y, _, grad_x, _, _, grad_bias = run(torch.ones_like(x), x, None, None, bias, 4, 1e-6)
    assert y is not None
    assert grad_x is not None
    assert grad_bias is not None
    assert y[0, :, 0, 0].tolist() == [0, 1000, 0, 88]
    assert torch.signbit(y[0, 0, 0, 0])
    assert grad_x.abs().max() == 0
    torch.testing.assert_close(grad_bias, torch.tensor([0.0, 4, 0, 4], device=device), rtol=1e-6, atol=1e-30)


@on_device
def test_nan_reaches_its_group_only(device: str) -> None:
    x = torch.randn(2, 4, 3, 3, device=device)
    x[1, 2, 1, 1] = float("nan")
    y = run(torch.ones_like(x), x, None, None, None, 2, 1e-6)[0]
    assert y is not None
    bad = y.isnan()
    assert bad[1, 2:].all()
    assert not bad[0].any()
    assert not bad[1, :2].any()


@on_device
def test_same_bits_every_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(kernels, "TILE", 128)
    grad, x, skip = (torch.randn(2, c, 9, 11, device=device) for c in (20, 12, 8))
    weight, bias = torch.randn(20, device=device), torch.randn(20, device=device)
    for first, second in zip(*(run(grad, x, skip, weight, bias, 4, 1e-6) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter truncates to bfloat16")
def test_bfloat16_is_the_rounded_float32() -> None:
    x = torch.randn(1, 4, 5, 3).bfloat16()
    stats = torch.empty(1, 2, 2, dtype=torch.float64)
    outputs = [torch.full(x.shape, float("nan"), dtype=d) for d in (torch.float32, torch.bfloat16)]
    for y in outputs:
        kernels.forward(x, None, None, None, y, stats, 2, 1e-6)
    truncated = (outputs[0].view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(outputs[1].float(), truncated)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1, 32, 8192, 8200), (3, 2, 16384, 22000)])
def test_more_than_2_31_elements(shape: tuple[int, int, int, int]) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs more GPU memory")
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
        y = torch.full_like(x, float("nan"))
        stats = torch.empty(shape[0], 2, 2, dtype=torch.float64, device="cuda")
        kernels.forward(x, None, None, None, y, stats, 2, 1e-6)
        torch.testing.assert_close(stats[..., 0], torch.zeros_like(stats[..., 0]), rtol=0, atol=1e-3)
        tail = (slice(-1, None), slice(-1, None), slice(-1, None))
        z = (x[tail].double() - stats[-1, -1, 0]) * stats[-1, -1, 1]
        torch.testing.assert_close(y[tail], F.silu(z).bfloat16(), rtol=2**-7, atol=1e-6)
        assert not any(bool(image.isnan().any()) for image in y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_capture() -> None:
    x = torch.randn(2, 32, 33, 31, device="cuda")
    grad = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(grad, x, None, None, None, 8, 1e-6)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(grad, x, None, None, None, 8, 1e-6)
    x.normal_()
    graph.replay()
    for got, want in zip(captured, run(grad, x, None, None, None, 8, 1e-6), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@on_device
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_offset_bias_and_residual(device: str, format: torch.memory_format) -> None:
    """An offset before the norm, and a bias and a residual in one addition, as in a ResBlock without gradients."""
    torch.manual_seed(2)
    x, residual = (torch.randn(2, 12, 9, 8).to(device, memory_format=format) for _ in range(2))
    offset, bias = (3 * torch.randn(12, dtype=torch.float64, device=device) for _ in range(2))
    y, stats = torch.empty_like(x), torch.empty(2, 4, 2, dtype=torch.float64, device=device)
    kernels.forward(x, None, None, None, y, stats, 4, 1e-6, offset)
    whole = x.double() + offset[:, None, None]
    want = F.silu(F.group_norm(whole, 4, eps=1e-6))
    # The sums are of one or two values at a place and of 72 places; z has six roundings and SiLU eight.
    assert_within_budget(y, want, magnitude=5, operations=2 * (2 + 72 + 4) + 14)
    before = y.double()
    kernels.add(y, [residual], [bias])
    want = before + residual.double() + bias[:, None, None]
    magnitude = before.abs() + residual.double().abs() + bias.abs()[:, None, None]
    assert_within_budget(y, want, magnitude=magnitude, operations=3)
