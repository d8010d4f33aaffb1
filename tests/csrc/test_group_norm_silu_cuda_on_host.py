"""The CUDA kernels of GroupNorm+SiLU without a GPU: g++ compiles them, and every thread block runs on the CPU."""

import ctypes
import random
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels.testing import assert_within_budget

# Errors in half units in the last place of the bounds of magnitudes(). z has 8 roundings and the sigmoid 10. The
# statistics have at most 32 units of 8 values per thread, about a shift that costs a factor of 9 in the worst case and
# 2 usually, and twice a tree of 128 / 16 + 16 additions. Everything between the blocks is float64.
FORWARD = 20
CHAIN = 256 + 32
GRADIENT = 38


@pytest.fixture(scope="module")
def host(on_host):
    built = on_host("group_norm_silu_cuda_on_host")
    built.core.scratch_bytes.restype = ctypes.c_int64
    return built


@dataclass
class Case:
    batch: int
    channels: int
    skip_channels: int
    groups: int
    height: int
    width: int
    dtype: torch.dtype
    layouts: tuple[str, str, str, str]  # x, skip, y and the incoming gradient, the outgoing ones
    parameters: tuple[torch.dtype | None, torch.dtype | None] = (torch.float32, torch.float32)
    mean: float = 0.0
    std: float = 1.0
    outlier: float = 0.0
    expanded: bool = False
    eps: float = 1e-6
    factor: float = 1.0  # multiplier of weight and bias


def values(rng, shape):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def magnitudes(joined, weight, bias, grad, groups, eps, spread):
    """Returns bounds on the magnitudes of the sums in y and in each gradient."""
    n, c = joined.shape[:2]
    by_group = joined.reshape(n, groups, -1)
    centred = by_group - by_group.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    xhat = centred.abs() * rstd + spread**0.5
    w = torch.ones(c, 1, 1) if weight is None else weight.abs()[:, None, None]
    z = xhat.view_as(joined) * w + (0 if bias is None else bias.abs()[:, None, None])
    h = grad.abs() * (1 + z)
    wh = (h * w).reshape(n, groups, -1)
    sums = wh.mean(2, keepdim=True) + (1 + xhat) * (wh * xhat).mean(2, keepdim=True)
    return {
        "y": z,
        "x": (rstd * (wh + sums)).view_as(joined),
        "weight": (h * xhat.view_as(h)).sum((0, 2, 3)),
        "bias": h.sum((0, 2, 3)),
    }


def check(host, rng, case):
    """Checks forward and backward, and returns the names and the kinds of the kernels that ran."""
    n, cx, cs, h, w = case.batch, case.channels, case.skip_channels, case.height, case.width
    c = cx + cs

    def tensor(channels, layout, filled=None):
        t = host.Poisoned(rng, (n, channels, h, w), case.dtype, layout)
        if filled is not None:
            t.view.copy_(filled)
            if case.expanded:
                t.view = t.view[:1].expand(n, -1, -1, -1)
        return t

    joined = values(rng, (n, c, h, w)) * case.std + case.mean
    if case.outlier:
        joined.flatten(2)[..., :1] = case.outlier
    x = tensor(cx, case.layouts[0], joined[:, :cx])
    skip = tensor(cs, case.layouts[1], joined[:, cx:]) if cs else None
    # the part along x makes the mean of dz xhat matter
    grad = tensor(c, case.layouts[2], values(rng, (n, c, h, w)) + (joined - case.mean) / case.std)
    y, grad_x = tensor(c, case.layouts[2]), tensor(cx, case.layouts[3])
    grad_skip = tensor(cs, case.layouts[3]) if cs else None
    weight, bias = (
        None if d is None else (values(rng, (c, 2)) * case.factor).to(d)[:, 1] for d in case.parameters
    )
    grad_weight, grad_bias = (
        None if t is None else torch.full_like(t, torch.nan, memory_format=torch.contiguous_format)
        for t in (weight, bias)
    )
    stats = torch.full((n, case.groups, 2), torch.nan, dtype=torch.float64)
    size = host.core.scratch_bytes(*map(ctypes.c_int64, (n, c, h * w, x.view.element_size())))
    assert size % 16 == 0
    scratch = torch.full((size // 8 + 2,), torch.nan, dtype=torch.float64)
    first = scratch[scratch.data_ptr() // 8 % 2 :]  # aligned to 16 bytes

    def run(function, *arguments):
        scratch.fill_(torch.nan)
        assert function(*arguments, ctypes.c_void_p(first.data_ptr())) == 0, "misaligned, or an unfit block"
        assert bool(first[size // 8 :].isnan().all()), "written beyond the scratch memory"

    views = [None if t is None else t.view for t in (x, skip)]
    address = ctypes.c_void_p(stats.data_ptr())
    groups = ctypes.c_int64(case.groups)
    run(
        host.core.forward,
        host.numbers([*views, weight, bias, y.view]),
        address,
        groups,
        ctypes.c_double(case.eps),
    )
    outgoing = [grad_x.view, grad_skip and grad_skip.view, grad_weight, grad_bias]
    run(
        host.core.backward,
        host.numbers([*views, weight, bias, grad.view, *outgoing]),
        address,
        groups,
    )

    wide = {"x": x.view, "skip": views[1], "weight": weight, "bias": bias}
    wide = {k: t.double().clone().contiguous().requires_grad_() for k, t in wide.items() if t is not None}
    inputs = torch.cat([wide[k] for k in ("x", "skip") if k in wide], 1)
    # the mean of a group changes only the accuracy of torch
    mean = inputs.detach().reshape(n, case.groups, -1).mean(2, keepdim=True)
    centred = (inputs.reshape(n, case.groups, -1) - mean).view(inputs.shape)
    z = torch.group_norm(centred, case.groups, wide.get("weight"), wide.get("bias"), case.eps)
    exact = F.silu(z)
    exact_grads = dict(
        zip(wide, torch.autograd.grad(exact, list(wide.values()), grad.view.double()), strict=True)
    )
    spread = 9 if case.outlier else 2
    parameters = [None if t is None else t.double() for t in (weight, bias)]
    bound = magnitudes(inputs.detach(), *parameters, grad.view.double(), case.groups, case.eps, spread)
    statistics = CHAIN * max(1, spread // 2)

    def compare(name, actual, expected, magnitude, operations):
        if case.dtype != torch.float64 and actual.dtype == torch.float64:
            actual = actual.float()  # only as exact as its arithmetic
        try:
            assert_within_budget(actual, expected, magnitude=magnitude, operations=operations)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error

    var = (inputs.detach().reshape(n, case.groups, -1) - mean).square().mean(2)
    torch.testing.assert_close(
        stats[..., 0],
        mean[..., 0],
        rtol=0,
        atol=1e-4 * float(var.max() ** 0.5) + 1e-12 * float(mean.abs().max()),
    )
    torch.testing.assert_close(stats[..., 1], (var + case.eps).rsqrt(), rtol=1e-4, atol=0)
    compare("y", y.view, exact.detach(), bound["y"], FORWARD + statistics)
    backward = GRADIENT + statistics + CHAIN
    compare("grad_x", grad_x.view, exact_grads["x"], bound["x"][:, :cx], backward)
    if grad_skip is not None:
        compare("grad_skip", grad_skip.view, exact_grads["skip"], bound["x"][:, cx:], backward)
    for name, got in (("weight", grad_weight), ("bias", grad_bias)):
        if got is not None:
            compare(f"grad_{name}", got, exact_grads[name], bound[name], backward)
    for name, t in (("y", y), ("grad_x", grad_x), ("grad_skip", grad_skip)):
        if t is not None:
            t.check_surroundings(name)
    ran = host.core.kernels_that_ran().decode()
    return set(re.findall(r"(Statistics|ApplyBackward|Apply|Sums|Combine|Reduce|Parameters)", ran)), set(
        re.findall(r"KindE(\d)", ran)
    )


def random_case(rng, host):
    dtype = rng.choice(host.DTYPES)
    lanes = 16 // dtype.itemsize
    per_group, groups = rng.choice(
        [(1, 1), (1, 5), (3, 2), (7, 1), (5, 32), (4, 4), (2, 16), (1, 32), (8, 3), (24, 1), (16, 16)]
    )
    c = per_group * groups
    skip = 0
    if c > 1 and rng.random() < 0.5:
        skip = rng.choice([rng.randint(1, c - 1), c // lanes // 2 * lanes])
    height, width = (rng.choice((1, 2, 4, 7, 8, 16, 31)) for _ in range(2))
    if c < 20 and rng.random() < 0.5:
        height, width = rng.choice(((67, 61), (64, 48), (1, 1021), (128, 1)))
    layouts = tuple(rng.choice(host.LAYOUTS) for _ in range(4))
    if rng.random() < 0.6:  # mostly layouts of the fast kernels
        layout = rng.choice(("contiguous", "channels_last", "channels_last_sliced"))
        layouts = (layout,) * 4
    case = Case(rng.randint(1, 3), c - skip, skip, groups, height, width, dtype, layouts)
    case.parameters = tuple(rng.choice((None, dtype, *host.DTYPES)) for _ in range(2))
    case.mean, case.std = rng.choice(((0.0, 1.0), (0.0, 1.0), (3.0, 0.05), (-40.0, 1.0)))
    case.expanded = rng.random() < 0.1
    case.eps = rng.choice((1e-6, 1e-5, 1e-3))
    return case


@pytest.mark.parametrize("seed", range(8))
def test_equals_torch_in_float64(host, seed, check_random_cases):
    check_random_cases(host, seed, random_case, check)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("channels_last", "0"), ("channels_last_sliced", "0"), ("contiguous", "1"), ("wild", "2")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_each_kernel(host, dtype, layout, kind):
    # 32 groups of 5 channels, one of which has channels of x and of skip
    case = Case(2, 96, 64, 32, 8, 12, dtype, (layout,) * 4)
    kernels, kinds = check(host, random.Random(0), case)
    assert kernels == {"Statistics", "Combine", "Apply", "Sums", "Reduce", "ApplyBackward", "Parameters"}
    assert kinds == {"2" if dtype == torch.float64 else kind}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "transposed"])
@pytest.mark.parametrize(
    ("mean", "std", "outlier"),
    [(1e4, 1.0, 0.0), (-1e6, 1.0, 0.0), (1e3, 1e-3, 0.0), (0.0, 1.0, 1e4), (0.0, 1.0, -1e6)],
)
def test_large_means_and_outliers(host, layout, mean, std, outlier):
    for c, groups, height, width in ((8, 2, 64, 40), (16, 4, 33, 36), (4, 1, 100, 64)):
        case = Case(1, c, 0, groups, height, width, torch.float32, (layout,) * 4)
        case.mean, case.std, case.outlier = mean, std, outlier
        check(host, random.Random(c), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, 1, 8, 8),  # one group of two slabs
        (1, 8, 8, 128, 128),  # many chunks
        (5, 264, 33, 1, 1),  # a slab that is not full
        (70, 8, 2, 4, 4),
        (1, 1, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_shapes_of_every_kind(host, layout, shape, dtype):
    n, c, groups, height, width = shape
    check(host, random.Random(1), Case(n, c, 0, groups, height, width, dtype, (layout,) * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_arguments_of_the_sigmoid(host, dtype):
    case = Case(1, 8, 0, 8, 16, 16, dtype, ("channels_last",) * 4)
    case.factor = 1000.0
    check(host, random.Random(2), case)
