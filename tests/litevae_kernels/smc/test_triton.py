"""Tests the Triton kernels on the CPU in Triton's interpreter, on a GPU if there is one, and compiled without one.

Triton reads TRITON_INTERPRET when a kernel is defined, so this module runs itself again in a process that has it
set. The device of the tests is the CPU in that process, and CUDA in this one.
"""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels.smc import reference
from litevae_kernels.tensors import accumulate_dtype
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("litevae_kernels.smc.triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="needs the compiler's kernels")

CASES = 12  # per test
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (  # C_out, C_in / groups, K_h, K_w, groups
    (1, 1, 1, 1, 1),
    (8, 16, 3, 3, 1),
    (6, 5, 1, 1, 2),
    (7, 3, 3, 3, 1),
    (4, 1, 3, 3, 4),
    (12, 32, 1, 1, 1),
    (6, 7, 2, 5, 3),
    (18, 8, 3, 3, 1),
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns NaN like `like`; in the interpreter float32 for bfloat16, to which it would truncate, not round."""
    dtype = dtype or like.dtype
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float32
    return torch.full(like.shape, float("nan"), dtype=dtype, device=like.device)


def run(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    eps: float,
    out: Tensor,
    grad_weight: Tensor,
) -> list[Tensor | None]:
    """Returns the modulated weight (in `out`), the norms and three gradients."""
    accumulate = accumulate_dtype(weight.dtype, out.dtype)
    norm = torch.full(weight.shape[:1], float("nan"), dtype=accumulate, device=weight.device)
    grad_scale = poisoned(scale)
    grad_gain = None if gain is None else poisoned(gain)
    kernels.forward(weight, scale, gain, out, norm, eps)
    kernels.backward(grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain, eps)
    return [out, norm, grad_weight, grad_scale, grad_gain]


def check(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    eps: float,
    out: Tensor,
    grad_weight: Tensor,
) -> None:
    """Compares all results with the reference in float64.

    The bounds are in half units in the last place, for n elements per filter. Squares of rounded products and their
    sum lose n + 2, relative to the sum. The root halves that and rounds, as do the sum with eps and the reciprocal:
    1 / d loses (n + 2) / 2 + 3, and w' loses 3 more. The gradient of v is factor g - along v, with factor = gain / d
    and along = (dot / norm) / d gain / d. The dot product sums n products of three roundings each, and the norm occurs
    three times, so (n + 3) + 3 ((n + 2) / 2 + 3) + 6 bounds both. The products add 3, and sums over filters and taps
    add their number.
    """
    actual = run(grad, weight, scale, gain, eps, out, grad_weight)
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in (weight, scale, gain)]
    exact = reference.modulate(*inputs, eps, torch.float64, False)
    wanted = iter(torch.autograd.grad(exact, [t for t in inputs if t is not None], grad.double()))
    gradients = [None if t is None else next(wanted) for t in inputs]

    filters, per_group, height, width = weight.shape
    groups = scale.numel() // per_group
    scales = scale.double().view(groups, per_group).repeat_interleave(filters // groups, 0)[:, :, None, None]
    w, g = weight.double().abs(), grad.double().abs()
    v = w * scales.abs()
    norm = v.square().sum((1, 2, 3), keepdim=True).sqrt()
    d = norm + eps
    strength = 1.0 if gain is None else gain.double().abs()
    dot = (g * v).sum((1, 2, 3), keepdim=True)
    slope = strength * (g / d + v * dot / (norm * d * d).clamp_min(1e-300) * (norm > 0))
    n, taps = per_group * height * width, height * width
    inverse = (n + 2) // 2 + 4
    sums = (n + 3) + 3 * inverse + 6
    each_scale = (w * slope).reshape(groups, filters // groups, per_group, taps).sum((1, 3))
    bounds = [
        (exact.abs().max().item(), inverse + 3),
        (norm.max().item(), inverse),
        ((slope * scales.abs()).max().item(), sums + 3),
        (each_scale.max().item(), sums + 4 + filters // groups * taps),
        ((dot / d).sum().item(), sums + filters),
    ]
    accumulate = accumulate_dtype(weight.dtype, out.dtype)
    targets = [exact.detach(), norm.flatten(), *gradients]
    for got, want, (magnitude, operations) in zip(actual, targets, bounds, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            if accumulate == torch.float32 and got.dtype == torch.float64:
                got = got.float()
            assert_within_budget(got, want, magnitude=magnitude, operations=operations)


def draw(seed: int, device: str) -> tuple[Any, ...]:
    r = random.Random(seed)
    torch.manual_seed(seed)
    c_out, c_in, height, width, groups = SHAPES[seed % len(SHAPES)]
    shape = (c_out, c_in, height, width)
    dtype, out_dtype = r.choice(DTYPES), r.choice(DTYPES)

    def tensor(dtype: torch.dtype, size: float) -> Tensor:
        return arrange(
            (torch.randn(shape) * size).to(dtype).to(device), r.choice((*LAYOUTS, "channels_last"))
        )

    def like(x: Tensor, dtype: torch.dtype) -> Tensor:
        memory_format = r.choice([torch.contiguous_format, torch.channels_last])
        return poisoned(x, dtype).contiguous(memory_format=memory_format)

    scale = torch.randn(2 * c_in * groups).to(r.choice(DTYPES)).to(device)
    scale = scale[::2] if r.random() < 0.3 else scale[: c_in * groups]
    gain = None if r.random() < 0.3 else torch.randn(1).to(r.choice(DTYPES)).to(device)
    weight = tensor(dtype, 10 ** r.uniform(-2, 1))
    grad = tensor(out_dtype, 1)
    return grad, weight, scale, gain, r.choice((1e-8, 1e-4)), like(weight, out_dtype), like(weight, dtype)


@on_device
@pytest.mark.parametrize("group", range(6))
def test_equals_the_reference_in_float64(device: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(group * CASES, (group + 1) * CASES):
        with monkeypatch.context() as patch:
            if seed // 4 % 2:  # filters in several blocks, scales from several blocks of filters
                patch.setattr(kernels, "BLOCK", 64)
                patch.setattr(kernels, "TILE", 64)
            case = draw(seed, device)
            try:
                check(*case)
            except Exception as error:
                error.add_note(f"seed {seed}: {[(t.shape, t.stride(), t.dtype) for t in case[:2]]}")
                raise


@on_device
@pytest.mark.parametrize("zero", ["filter", "scales"])
def test_zeros(device: str, zero: str) -> None:
    """Zeros give zeros, with the finite gradient gain / eps."""
    torch.manual_seed(0)
    weight, scale, gain = (torch.randn(s, device=device) for s in ((3, 4, 3, 3), (4,), (1,)))
    (weight[1] if zero == "filter" else scale).zero_()
    grad = torch.randn_like(weight)
    case = (grad, weight, scale, gain, 1e-4, poisoned(weight), poisoned(weight))
    out, norm, *gradients = run(*case)
    assert out is not None
    assert norm is not None
    assert (out[1] == 0).all()
    assert norm[1] == 0
    assert all(g is not None and g.isfinite().all() for g in gradients)
    check(*case)


@on_device
@pytest.mark.parametrize("size", [1e-4, 6e-8, 6e4])
def test_half_precision_neither_under_nor_overflows(device: str, size: float) -> None:
    torch.manual_seed(0)
    weight = ((torch.rand(4, 8, 3, 3) + 0.01).sign() * size).half().to(device)
    scale = torch.full((8,), 0.5, device=device)
    out = torch.empty_like(weight)
    norm = torch.empty(4, device=device)
    kernels.forward(weight, scale, None, out, norm, 1e-12)
    torch.testing.assert_close(out, torch.full_like(out, 72**-0.5), rtol=2**-10, atol=0)


@on_device
def test_same_bits_every_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 64)
    weight, grad = torch.randn(2, 19, 12, 3, 3, device=device)
    scale, gain = torch.randn(12, device=device), torch.ones(1, device=device)
    results = [run(grad, weight, scale, gain, 1e-8, poisoned(weight), poisoned(weight)) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# The arguments of a launch, without launching.

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
Launches = Callable[..., list[Launch]]


@pytest.fixture
def run_both(launches: Launches) -> Launches:
    """Returns a function that records the launches of the kernels, forwards and backwards, for a shape."""

    def run(
        shape: tuple[int, int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype = torch.bfloat16,
        format: torch.memory_format = torch.channels_last,
        out_format: torch.memory_format | None = None,
        groups: int = 1,
        gain: bool = True,
    ) -> list[Launch]:
        # Tensors on the meta device take no memory, and their address 0 counts as aligned.
        weight = torch.empty(shape, dtype=dtype, device="meta", memory_format=format)
        out = torch.empty(shape, dtype=out_dtype, device="meta", memory_format=out_format or format)
        scale = torch.empty(shape[1] * groups, device="meta")
        strength = torch.empty(1, device="meta") if gain else None
        norm = torch.empty(shape[0], dtype=accumulate_dtype(dtype, out_dtype), device="meta")

        def call() -> None:
            kernels.forward(weight, scale, strength, out, norm, 1e-8)
            kernels.backward(out, weight, scale, strength, norm, weight, scale, strength, 1e-8)

        return launches(kernels, call)

    return run


@pytest.mark.parametrize(
    ("shape", "groups"), [((2**20, 1, 3, 3), 2**20), ((3 * 2**29, 1, 1, 1), 1), ((1, 2**20, 33, 65), 1)]
)
def test_grids_of_huge_sizes(shape: tuple[int, int, int, int], groups: int, run_both: Any) -> None:
    assert run_both(shape, groups=groups)


# Kernels compiled ahead of time, for a GPU that this machine need not have.


@not_interpreted
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_vectors_and_no_spills(
    format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
    accesses: Any,
    resources: Any,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = run_both((512, 512, 3, 3), format=format)
    assert len(found) == 5
    for launch in found:
        name = launch[0].__name__
        compiled = compile_for_sm90(launch)
        assert resources(compiled)[1] == 0, name
        if name in ("modulate_weight_kernel", "modulate_weight_grad_kernel"):
            ptx = compiled.asm["ptx"]
            loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
            assert loads[16] >= 2, (name, loads)
            assert loads[2] == 0, (name, loads)
            # Only the norm and the three factors are stored one by one.
            assert stores[2] == 0, (name, stores)
            assert stores[4] <= 3, (name, stores)
            assert stores[16] + stores[8] >= 2, (name, stores)
            assert not re.search(r"\.f64", ptx), name


@not_interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (96, 64, 3, 3), "format": torch.contiguous_format, "out_format": torch.channels_last},
        {"shape": (32, 1, 3, 3), "groups": 32, "gain": False},
        {"shape": (16, 8, 1, 1), "dtype": torch.float64, "out_dtype": torch.float16},
        {"shape": (4, 4096, 5, 5), "dtype": torch.bfloat16, "format": torch.contiguous_format},
    ],
    ids=["mixed", "depthwise", "fp64", "long"],
)
def test_kernels_compile(
    case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
    resources: Any,
    lanes_agree: Any,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in run_both(**case):
        compiled = compile_for_sm90(launch)
        assert lanes_agree(compiled.asm["ptx"]), launch[0].__name__
        assert len(compiled.asm["cubin"]) > 0
        assert resources(compiled)[1] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("filter", [(1, 1, 1), (4, 3, 3), (128, 1, 1), (30, 3, 3)])
def test_equal_filters_give_equal_norms_and_weights(filter: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    weight, grad = (torch.randn(1, *filter, device="cuda").expand(64, *filter) for _ in range(2))
    scale = torch.randn(filter[0], device="cuda")
    out, grad_weight = (torch.empty(weight.shape, device="cuda") for _ in range(2))
    for x in run(grad, weight, scale, None, 1e-8, out, grad_weight)[:3]:
        assert x is not None
        assert torch.equal(x, x[:1].expand_as(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_capture() -> None:
    weight, grad = torch.randn(2, 64, 32, 3, 3, device="cuda")
    scale, gain = torch.randn(32, device="cuda"), torch.ones(1, device="cuda")

    def call() -> list[Tensor | None]:
        return run(grad, weight, scale, gain, 1e-8, poisoned(weight), poisoned(weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    weight.normal_()
    graph.replay()
    for got, want in zip(captured, call(), strict=True):
        assert torch.equal(got, want)
