"""Tests the CUDA kernels of weight modulation without a GPU: g++ compiles them, and every block runs on the CPU."""

import ctypes
import random
import re
from dataclasses import dataclass

import pytest
import torch

from litevae_kernels.testing import assert_within_budget

# In half units in the last place: products and quotients, and the sum of squares (or of g v), which is a sum per
# thread and then two sums of 16 partial sums.
OPERATIONS = 12


@pytest.fixture(scope="module")
def host(on_host):
    built = on_host("smc_cuda_on_host")
    built.core.scratch_bytes.restype = ctypes.c_int64
    return built


@dataclass
class Case:
    filters: int
    channels: int  # channels of a filter
    kernel: tuple[int, int]
    groups: int
    dtypes: tuple[torch.dtype, ...]  # weight, scale, gain, modulated and its gradient
    layouts: tuple[str, str, str]  # weight, modulated and its gradient, weight's gradient
    has_gain: bool = True
    size: float = 1.0
    zeros: str = ""
    eps: float = 1e-8


def values(rng, shape):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def check(host, rng, case):
    shape = case.filters, case.channels, *case.kernel
    weight_dtype, scale_dtype, gain_dtype, dtype = case.dtypes
    weight = host.Poisoned(rng, shape, weight_dtype, case.layouts[0])
    weight.view.copy_(values(rng, shape) * case.size)
    scale = (1 + 0.3 * values(rng, (case.groups * case.channels, 2))).to(scale_dtype)[:, 0]
    if case.zeros == "filter":
        weight.view[case.filters // 2].zero_()
    elif case.zeros == "scale":
        scale[0] = 0
    elif case.zeros == "scales":
        scale.zero_()
    gain = torch.tensor([1.7], dtype=gain_dtype) if case.has_gain else None
    wide = torch.float64 if torch.float64 in (weight_dtype, dtype) else torch.float32
    norm = torch.full((case.filters,), torch.nan, dtype=wide)
    modulated = host.Poisoned(rng, shape, dtype, case.layouts[1])
    grad = host.Poisoned(rng, shape, dtype, case.layouts[1])
    grad.view.copy_(values(rng, shape))
    grad_weight = host.Poisoned(rng, shape, weight_dtype, case.layouts[2])
    grad_scale, grad_gain = (
        None if t is None else torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (scale, gain)
    )
    elements = host.core.scratch_bytes(host.numbers([weight.view, norm])) // wide.itemsize
    scratch = torch.full((elements + 8,), torch.nan, dtype=wide)

    inputs = [weight.view, scale, gain, norm]
    eps = ctypes.c_double(case.eps)
    assert host.core.forward(host.numbers([*inputs, modulated.view]), eps) == 0
    gradients = [grad_weight.view, grad_scale, grad_gain]
    tensors = host.numbers([*inputs, grad.view, *gradients])
    assert host.core.backward(tensors, eps, ctypes.c_void_p(scratch.data_ptr())) == 0
    assert bool(scratch[elements:].isnan().all()), "written beyond the scratch memory"
    assert not scratch[:elements].isnan().any(), "more scratch memory than the kernels use"

    leaves = [
        t.double().clone().contiguous().requires_grad_() for t in (weight.view, scale, gain) if t is not None
    ]
    by_filter = leaves[1].view(case.groups, -1).repeat_interleave(case.filters // case.groups, 0)
    v = leaves[0] * by_filter[:, :, None, None]
    n = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    exact = v / (n + case.eps) * (leaves[2] if case.has_gain else 1)
    wide_grad = grad.view.double()
    exact_grads = torch.autograd.grad(exact, leaves, wide_grad)

    count = case.channels * case.kernel[0] * case.kernel[1]
    operations = OPERATIONS + count // 256 + 1 + case.kernel[0] * case.kernel[1] + 32
    with torch.no_grad():
        d, g = n + case.eps, gain.double() if case.has_gain else torch.ones(1).double()
        along = (wide_grad * v).abs().sum((1, 2, 3), keepdim=True)
        slope = g * (wide_grad.abs() / d + v.abs() * along / (n * d * d).clamp(min=1e-300))
        by_channel = (slope * leaves[0].abs()).sum((2, 3))
        parts = by_channel.view(case.groups, -1, case.channels).sum(1).flatten()
        bounds = [slope * by_filter.abs()[:, :, None, None], parts, (along / d).sum().view(1)]
    narrow = [
        t if wide == torch.float64 or t.dtype != torch.float64 else t.float()
        for t in gradients
        if t is not None
    ]
    assert_within_budget(norm, n.detach().flatten(), magnitude=n.detach().flatten(), operations=operations)
    assert_within_budget(
        modulated.view, exact.detach(), magnitude=exact.detach().abs(), operations=operations
    )
    for name, got, want, bound in zip(("weight", "scale", "gain"), narrow, exact_grads, bounds, strict=False):
        assert bool(got.isfinite().all())
        try:
            assert_within_budget(got, want, magnitude=bound, operations=2 * operations)
        except AssertionError as error:
            raise AssertionError(f"grad_{name}: {error}") from error
    for name, t in (
        ("weight", weight),
        ("modulated", modulated),
        ("grad", grad),
        ("grad_weight", grad_weight),
    ):
        t.check_surroundings(name)
    return set(re.findall(r"\d+([A-Z]\w+?)I([fd])E", host.core.kernels_that_ran().decode()))


def random_case(rng, host):
    groups = rng.choice((1, 1, 1, 2, 3))
    filters = groups * rng.choice((1, 2, 5, 8))
    channels = rng.choice((1, 2, 3, 7, 16, 33, 64, 100, 300))
    kernel = rng.choice(((1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 4), (7, 7)))
    dtypes = tuple(rng.choices(host.DTYPES, (4, 1, 2, 2), k=4))
    layouts = tuple(rng.choice(host.LAYOUTS) for _ in range(3))
    case = Case(filters, channels, kernel, groups, dtypes, layouts, rng.random() < 0.7)
    case.size = rng.choice((1.0, 0.02, 1e-3))
    case.zeros = rng.choice(("", "", "filter", "scale"))
    # If all are zero, the slope is 1 / eps, which float16 must be able to represent.
    case.eps = 1e-3 if case.zeros else rng.choice((1e-8, 1e-6, 1e-3))
    return case


@pytest.mark.parametrize("seed", range(8))
def test_equals_torch_in_float64(host, seed, check_random_cases):
    check_random_cases(host, seed, random_case, check)


F32, F64, F16 = torch.float32, torch.float64, torch.float16


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
@pytest.mark.parametrize("channels", [512, 1400, 3000])  # for shared memory in both passes, forward, neither
def test_large_filters(host, channels, layouts, dtype):
    case = Case(2, channels, (3, 3), 1, (dtype,) * 4, (*layouts, layouts[0]))
    ran = check(host, random.Random(0), case)
    letter = "d" if dtype == F64 else "f"
    assert ran == {("Modulate", letter), ("ModulateBackward", letter), ("Gather", letter)}


def test_depthwise(host):
    check(host, random.Random(0), Case(70, 1, (3, 3), 70, (F32,) * 4, ("contiguous",) * 3))


@pytest.mark.parametrize("zeros", ["filter", "scale", "scales"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_zeros(host, dtype, zeros):
    case = Case(4, 16, (3, 3), 1, (dtype,) * 4, ("channels_last",) * 3, zeros=zeros)
    check(host, random.Random(0), case)


def test_small_half_precision_weights(host):
    case = Case(8, 64, (3, 3), 1, (F16, F32, F32, F16), ("contiguous", "channels_last", "contiguous"))
    case.size = 1e-4
    check(host, random.Random(0), case)
