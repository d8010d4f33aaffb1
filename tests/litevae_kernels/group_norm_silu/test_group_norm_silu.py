"""group_norm_silu and its gradients against torch.nn.functional in float64, on every backend that runs here."""

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.backend import core
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes

BACKENDS = ("reference", "native")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "skip", "weight", "bias")

# The error budget of a first-order analysis, in units of half a last place of the arithmetic's type:
#
# z = (x - mean) rstd weight + bias: 2 roundings of the difference (of the mean kept as two floats, or of the
#   difference), 2 for the factor rstd weight, 2 for the weight and the bias brought to the arithmetic's type, the
#   product, the sum: 8, of at most Z = |xhat weight| + |bias|.
# sigmoid: the argument's scaling by log2(e), whose effect |z| s (1 - s) is below a quarter, 1; a Horner polynomial
#   and the scaling by 2^n, 4; 1 + e, 1; the reciprocal, "to the last place or two", 4: 10.
# y = z s: slope at most 1.1, so 1.1 * 8 + 10 + 1 < FORWARD of Z. (At most 1 when z -> y is exact: silu(z) <= |z|.)
FORWARD = 20
# silu'(z) = s (1 + z (1 - s)), below 1.1: 10 for s and again for 1 - s (whose factor z s is at most |z|), 4 more;
#   z's own 8 times |silu''| <= 1/2. The product with the incoming gradient, one. So h = grad silu'(z) is off by at
#   most 25 (1 + Z) |grad|: H = (1 + Z) |grad| is the magnitude that all gradients are made of.
# grad_bias = sum h; grad_weight = sum h xhat: xhat adds 4, the product 1.
# grad_x = rstd (weight h - mean(weight h) - xhat mean(weight h xhat)): 8 for the products, 3 for the sums, 2 for
#   the divisions.
BACKWARD = 25 + 13
# Roundings of the longest chain of additions. They affect the mean, rstd (by half) and the sums of the gradients.
#   reference: torch.sum adds in cascades, four levels of at most 16 up to 2^20 values, 4 vectors of 8 lanes at the
#   end, and the images (at most 16) after one another; plus the division. Its mean loses digits of |mean|.
#   native: at most 128 additions before the sums become float64; a chunk's mean and its square, 4 more. They are
#   sums about a shift, the mean of an eighth of the chunk. The sum of squares about the shift is up to `spread` times
#   the sum about the mean: 2 if that eighth is like the rest, and at most 9. So |x - shift|, on which the error of
#   the mean depends, is sqrt(spread) standard deviations on average.
CHAIN = {"reference": 64 + 12 + 16 + 1, "native": 128 + 4}


class Call(NamedTuple):
    x: torch.Tensor
    groups: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    eps: float = 1e-6

    def inputs(self):
        return [t for t in (self.x, self.skip, self.weight, self.bias) if t is not None]

    def names(self):
        return [
            n
            for n, t in zip(NAMES, (self.x, self.skip, self.weight, self.bias), strict=True)
            if t is not None
        ]


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def run(call, grad):
    """Returns y and the gradients by name; the inputs keep their strides."""
    leaves = {n: t.detach().requires_grad_() for n, t in zip(call.names(), call.inputs(), strict=True)}
    y = group_norm_silu(
        leaves["x"],
        call.groups,
        leaves.get("weight"),
        leaves.get("bias"),
        eps=call.eps,
        skip=leaves.get("skip"),
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def wide(t):
    return t.detach().double().contiguous()  # torch's channels_last kernels lose digits at a large mean


def exact(call, grad):
    """Returns the same from torch in float64."""
    leaves = {n: wide(t).requires_grad_() for n, t in zip(call.names(), call.inputs(), strict=True)}
    joined = torch.cat([leaves[n] for n in ("x", "skip") if n in leaves], 1)
    # F.group_norm calls this function too, but refuses groups of one value. Weight and bias are applied by hand,
    # because torch 2.11 has no gradient where one of them is missing.
    z = torch.group_norm(joined, call.groups, None, None, call.eps)
    shape = (-1,) + (1,) * (joined.ndim - 2)
    if "weight" in leaves:
        z = z * leaves["weight"].view(shape)
    if "bias" in leaves:
        z = z + leaves["bias"].view(shape)
    y = F.silu(z)
    gradients = torch.autograd.grad(y, list(leaves.values()), wide(grad))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def budgets(call, grad, backend, spread=2):
    """Returns, for y and each gradient, the magnitude of each element and the number of roundings (see above)."""
    joined = torch.cat([wide(t) for t in (call.x, call.skip) if t is not None], 1)
    n, c = joined.shape[:2]
    groups = joined.reshape(n, call.groups, -1)
    rstd = (groups.var(2, correction=0, keepdim=True) + call.eps).rsqrt()
    xhat = (groups - groups.mean(2, keepdim=True)).abs() * rstd
    # PyTorch rounds the mean, to the reference's float32, or weight rstd x and weight rstd mean to the oracle's float64
    share = 1.0 if backend == "reference" or call.x.dtype == torch.float64 else 2.0**-29
    deviation = groups.std(2, correction=0, keepdim=True) * rstd  # 1, or less by eps
    xhat = xhat + groups.abs().mean(2, keepdim=True) * rstd * share + spread**0.5 * deviation

    def by_group(t):
        return t.view(n, call.groups, -1)

    def channels(t):
        return torch.ones(c, 1, 1) if t is None else wide(t).abs()[:, None, None]

    weight = channels(call.weight).double()
    z = xhat.view_as(joined) * weight + (0 if call.bias is None else channels(call.bias))
    h = wide(grad).abs() * (1 + z)
    wh = by_group(h * weight)
    sums = wh.mean(2, keepdim=True) + (1 + xhat) * (wh * xhat).mean(2, keepdim=True)
    grad_joined = (rstd * (wh + sums)).view_as(joined)
    magnitudes = {
        "y": z,
        "x": grad_joined[:, : call.x.shape[1]],
        "skip": grad_joined[:, call.x.shape[1] :],
        "weight": (h * xhat.view_as(h)).sum((0, 2, 3)),
        "bias": h.sum((0, 2, 3)),
    }
    # rstd has half of the error of its sum of squares, and grad_x has that error and those of its own sums.
    # No chain is longer than the number of values, or of pixels per channel where the other sums are float64.
    chain = min(CHAIN[backend], h[0, 0].numel() + 4 if backend == "native" else h.numel() + 1)
    statistics = int(chain * max(1, spread / 2))
    return {
        n: (m, FORWARD + statistics if n == "y" else BACKWARD + statistics + chain)
        for n, m in magnitudes.items()
    }


def stored(actual, x):
    """Returns a float64 gradient as float32 if the arithmetic of the call was float32."""
    return actual.float() if actual.dtype == torch.float64 and x.dtype != torch.float64 else actual


def check(call, grad, backend, spread=2):
    """Compares a call with torch, and returns its results."""
    before = [t.clone() for t in (*call.inputs(), grad)]
    with use_backend(backend), poisoned_memory():
        actual = run(call, grad)
    for a, b in zip((*call.inputs(), grad), before, strict=True):
        assert torch.equal(a, b)  # inputs are not written
    expected = exact(call, grad)
    allowed = budgets(call, grad, backend, spread)
    for name, value in actual.items():
        assert value.dtype == (call.x.dtype if name == "y" else getattr(call, name).dtype)
        magnitude, operations = allowed[name]
        try:
            assert_within_budget(
                stored(value, call.x), expected[name], magnitude=magnitude, operations=operations
            )
        except AssertionError as error:
            described = {
                n: (tuple(t.shape), t.dtype, t.stride())
                for n, t in zip(call.names(), call.inputs(), strict=True)
            }
            raise AssertionError(
                f"{name}: {error}; groups {call.groups}, eps {call.eps}, {described}"
            ) from error
    return actual


def random_call(rng, dtype, layout, seed):
    """Returns a random call, with groups of any number and size that end anywhere in x or skip, and a gradient."""
    ((n, _, h, w),) = shapes(1, seed=seed)
    per_group, groups = rng.choice([(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (5, 3), (7, 1), (2, 16), (1, 32)])
    c = per_group * groups
    if c > 8:
        h, w = h % 17 + 1, w % 17 + 1
    scale, shift = rng.choice([1.0, 0.05]), rng.choice([0.0, 0.0, 3.0, -40.0])
    border = rng.randint(1, c - 1) if c > 1 and rng.random() < 0.5 else c
    joined = (values((n, c, h, w), seed=seed) * scale + shift).to(dtype)
    parameters = []
    for i in (1, 2):
        parameter_dtype = rng.choice([None, dtype, *DTYPES])
        parameter = parameter_dtype and values((c,), parameter_dtype, seed=seed + i)
        if parameter is not None and rng.random() < 0.3:
            parameter = torch.stack([parameter, parameter], 1)[:, 0]  # a stride of 2
        parameters.append(parameter)
    call = Call(
        arrange(joined[:, :border], layout),
        groups,
        *parameters,
        arrange(joined[:, border:], rng.choice(LAYOUTS)) if border < c else None,
        rng.choice([1e-6, 1e-5, 1e-3]),
    )
    grad = arrange(values((n, c, h, w), dtype, seed=seed + 3), rng.choice(LAYOUTS))
    return call, grad


# There are 400 cases per backend: 4 dtypes x 5 layouts of x x 20, with everything else at random.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_in_float64(backend, layout, dtype):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(20):
        seed = 1000 * LAYOUTS.index(layout) + 100 * DTYPES.index(dtype) + 5 * i
        call, grad = random_call(rng, dtype, layout, seed)
        actual = check(call, grad, backend)
        channels_last = layout == "channels_last" and call.x.shape[1] > 1
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert actual["y"].is_contiguous(memory_format=memory_format)
        if backend == "native":
            assert actual["x"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("skip_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_skip_and_gradient(backend, layout, skip_layout, grad_layout):
    # 6 + 10 channels in 4 groups: the second one straddles the border
    x, skip, grad = (values((2, c, 7, 9), torch.float32, seed=c) for c in (6, 10, 16))
    parameters = (values(16, torch.float32, seed=1), values(16, torch.float32, seed=2))
    call = Call(arrange(x, layout), 4, *parameters, arrange(skip, skip_layout))
    actual = check(call, arrange(grad, grad_layout), backend)
    for name, source in [("y", layout), ("x", layout), ("skip", skip_layout)]:
        if backend == "native" or name == "y":
            channels_last = source == "channels_last"
            assert actual[name].is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float32, 1e4, 1.0),
        (torch.float32, -1e6, 1.0),
        (torch.float32, 1e3, 1e-3),
        (torch.float64, 1e8, 1.0),
        (torch.bfloat16, 1e4, 100.0),
        (torch.float16, 1e4, 10.0),
    ],
)
def test_a_large_mean(backend, layout, dtype, mean, std):
    if backend == "reference" and abs(mean) > 1e5 * std and dtype != torch.float64:
        pytest.skip("the reference's mean is a float32")
    for shape, groups, border in [((2, 8, 24, 20), 2, 8), ((1, 32, 40, 33), 8, 18), ((3, 3, 5, 7), 3, 2)]:
        joined = (values(shape) * std + mean).to(dtype)
        c = shape[1]
        call = Call(
            arrange(joined[:, :border], layout),
            groups,
            values(c, torch.float32, seed=1),
            values(c, torch.float32, seed=2),
            arrange(joined[:, border:], layout) if border < c else None,
        )
        check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outlier", [1e4, -1e6])
def test_first_pixels_that_are_far_from_the_rest(backend, layout, outlier):
    # A shift taken from the first values would fail: the sum of squares about it keeps no digit of the variance.
    for shape, groups, count in [((2, 8, 24, 20), 2, 1), ((1, 16, 33, 40), 4, 20), ((1, 2, 100, 70), 2, 1)]:
        x = values(shape)
        x.flatten(2)[..., :count] = outlier
        call = Call(
            arrange(x.float(), layout),
            groups,
            values(shape[1], torch.float32, seed=1),
            values(shape[1], torch.float32, seed=2),
        )
        check(call, arrange(values(shape, torch.float32, seed=3), layout), backend, spread=9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_groups(backend, dtype, layout):
    shape = (2, 8, 6, 5)
    for constant in (0.0, 1.0, -37.0, 1000.0):
        x = arrange(torch.full(shape, constant, dtype=dtype), layout)
        bias = values(8, torch.float32, seed=2)
        call = Call(x, 4, values(8, torch.float32, seed=1), bias, eps=1e-4)
        actual = check(call, values(shape, dtype, seed=3), backend)
        for name in ("x", "weight", "bias"):
            assert actual[name].isfinite().all()
        if backend == "native" and dtype != torch.float64:
            # the mean of equal values is that value, so only the bias remains
            assert_within_budget(
                actual["y"],
                F.silu(bias.double())[:, None, None].expand(shape),
                magnitude=bias.abs().max().item(),
                operations=FORWARD,
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1e12, 1e18])
def test_small_and_huge_values(backend, dtype, size):
    if backend == "reference" and dtype == torch.float32 and size > 1e12:
        pytest.skip("autograd's rstd^3 is below float32, in torch.nn.functional.group_norm as well")
    # with 90 values per group, the sum of their squares is 1e38, within float32
    x = values((2, 4, 5, 9), dtype) * size
    call = Call(x, 2, values(4, torch.float32, seed=1), values(4, torch.float32, seed=2))
    check(call, values(x.shape, dtype, seed=3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_whose_squares_overflow_are_right_or_vanish(backend):
    # torch's variance is infinite here and the normalised values are zero; better results are allowed
    x = values((1, 4, 32, 32), torch.float32) * 3e19
    bias = values(4, torch.float32, seed=2)
    with use_backend(backend):
        y = group_norm_silu(x, 2, bias=bias)
    vanished = F.silu(bias.double())[:, None, None].expand(x.shape)
    if torch.equal(y[..., :1, :1].expand_as(y), y):
        assert_within_budget(y, vanished, magnitude=3.0, operations=FORWARD)
    else:
        call = Call(x, 2, None, bias)
        magnitude, operations = budgets(call, torch.zeros_like(x), backend)["y"]
        expected = exact(call, torch.zeros_like(x))["y"]
        assert_within_budget(y, expected, magnitude=magnitude, operations=operations)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_silu_far_from_zero(backend, dtype, layout):
    # z up to 1000 and beyond on both sides, and every size in between
    shape = (1, 6, 21, 13)
    weight = torch.tensor([1e3, -1e3, 90.0, 20.0, 1.0, 1e-3])
    bias = torch.tensor([-1e3, 1e3, -88.0, 60.0, -15.0, 0.0])
    for parameters in [(weight, bias), (None, bias), (weight, None)]:
        actual = check(
            Call(arrange(values(shape, dtype), layout), 3, *parameters), values(shape, dtype, seed=3), backend
        )
        assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_own_group_only(backend, layout, dtype, bad):
    # groups of 4 channels, images of two groups of x, one over the border and one of skip
    joined, grad = values((2, 16, 11, 9), dtype), values((2, 16, 11, 9), dtype, seed=1)
    parameters = (values(16, dtype, seed=2), values(16, dtype, seed=3))

    def both(joined):
        call = Call(arrange(joined[:, :10], layout), 4, *parameters, arrange(joined[:, 10:], layout))
        with use_backend(backend), poisoned_memory():
            return run(call, grad)

    clean = both(joined)
    for channel in (1, 9, 10, 15):
        spoiled = joined.clone()
        spoiled[1, channel, 10, 8] = bad
        actual = both(spoiled)
        group = slice(channel // 4 * 4, channel // 4 * 4 + 4)
        for a, b in [
            (actual["y"], clean["y"]),
            *[(torch.cat([t["x"], t["skip"]], 1) for t in (actual, clean))],
        ]:
            assert a[1, group].isnan().all()
            rest = torch.ones(2, 16, dtype=torch.bool)
            rest[1, group] = False
            assert torch.equal(a[rest], b[rest])
        for name in ("weight", "bias"):
            assert actual[name][group].isnan().all()
            rest = torch.ones(16, dtype=torch.bool)
            rest[group] = False
            assert torch.equal(actual[name][rest], clean[name][rest])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_own_group_only(backend, bad):
    x, grad = values((2, 6, 5, 7), torch.float32), values((2, 6, 5, 7), torch.float32, seed=1)
    grad[0, 2, 3, 3] = bad
    with use_backend(backend):
        actual = run(Call(x, 3), grad)["x"]
    assert not actual[0, 2:4].isfinite().any()
    actual[0, 2:4] = 0
    assert actual.isfinite().all()


DEGENERATE = [  # shape, groups, channels of x
    ((1, 1, 1, 1), 1, 1),
    ((3, 1, 1, 1), 1, 1),
    ((2, 5, 1, 1), 5, 5),  # groups of one value
    ((2, 6, 1, 1), 2, 3),
    ((1, 1, 37, 41), 1, 1),
    ((1, 7, 1, 13), 7, 7),  # groups == channels
    ((2, 13, 11, 1), 13, 6),
    ((1, 2, 1, 1), 1, 1),
    ((5, 31, 3, 5), 1, 30),
    ((1, 64, 3, 3), 32, 1),  # x ends in the first group
    ((1, 64, 3, 3), 32, 63),  # x ends in the last group
    ((4, 33, 2, 2), 11, 16),
    ((1, 257, 2, 3), 257, 100),
    ((16, 4, 2, 1), 2, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_and_odd_shapes(backend, layout, dtype):
    for i, (shape, groups, border) in enumerate(DEGENERATE):
        joined, c = values(shape, dtype, seed=i), shape[1]
        call = Call(
            arrange(joined[:, :border], layout),
            groups,
            values(c, torch.float32, seed=1),
            values(c, torch.float32, seed=2),
            arrange(joined[:, border:], layout) if border < c else None,
            1e-3,
        )
        check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (0, 4), (2, 4, 0)])
def test_nothing_in_nothing_out(backend, with_skip, shape):
    x = torch.zeros(shape, requires_grad=True)
    skip = torch.zeros(shape, requires_grad=True) if with_skip else None
    c = 8 if with_skip else 4
    weight, bias = (torch.ones(c, requires_grad=True) for _ in range(2))
    with use_backend(backend), poisoned_memory():
        y = group_norm_silu(x, 2, weight, bias, skip=skip)
        inputs = [t for t in (x, weight, bias, skip) if t is not None]
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (shape[0], c, *shape[2:])
    for gradient, t in zip(gradients, inputs, strict=True):
        assert gradient.shape == t.shape
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 1, 1), (2, 4)])
def test_an_empty_skip(backend, shape):
    x = values(shape, torch.float32)
    with use_backend(backend), poisoned_memory():
        assert torch.equal(group_norm_silu(x, 2, skip=x[:, :0]), group_norm_silu(x, 2))
        assert torch.equal(group_norm_silu(x[:, :0], 2, skip=x), group_norm_silu(x, 2))


def test_one_dimension_keeps_its_memory_format():
    x = values((2, 50, 8), torch.float32).transpose(1, 2)
    assert group_norm_silu(x, 4).stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 13), (2, 8, 3, 4, 5), (1, 8, 2, 3, 2, 5), (2, 8, 1, 1, 1)])
def test_other_numbers_of_dimensions(backend, shape):
    formats = [torch.contiguous_format] + ([torch.channels_last_3d] if len(shape) == 5 else [])
    flat = (*shape[:2], -1, 1)
    for memory_format in formats:
        x, skip, grad = (values(shape, torch.float32, seed=i) for i in range(3))
        grad = torch.cat([grad, values(shape, torch.float32, seed=4)], 1).contiguous(
            memory_format=memory_format
        )
        x = x.contiguous(memory_format=memory_format)
        weight, bias = (values(16, torch.float32, seed=i) for i in (5, 6))
        call = Call(x, 4, weight, bias, skip, 1e-3)
        with use_backend(backend), poisoned_memory():
            actual = run(call, grad)
        assert actual["y"].is_contiguous(memory_format=memory_format)
        flattened = Call(x.reshape(flat), 4, weight, bias, skip.reshape(flat), 1e-3)
        flat_grad = grad.reshape(shape[0], 16, -1, 1)
        expected, allowed = exact(flattened, flat_grad), budgets(flattened, flat_grad, backend)
        for name, value in actual.items():
            if name in ("y", "x", "skip"):
                assert value.shape == (shape[0], 16 if name == "y" else 8, *shape[2:])
                value = value.reshape(expected[name].shape)
            magnitude, operations = allowed[name]
            assert_within_budget(value, expected[name], magnitude=magnitude, operations=operations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    storage = values(4000, torch.float32)
    offset = storage[37 : 37 + 2 * 6 * 5 * 7].view(2, 6, 5, 7)
    overlapping = storage.as_strided((2, 6, 5, 7), (11, 3, 2, 1), 5)
    negated = torch.complex(storage, storage).conj().imag[3:423].view(2, 6, 5, 7)
    assert negated.is_neg()
    stepped = storage[: 2 * 6 * 10 * 21].view(2, 6, 10, 21)[:, :, ::2, ::3]
    permuted = offset.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    batch_inner = offset.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    flipped = offset.flip(3)
    grad = values((2, 12, 5, 7), torch.float32, seed=3)
    weight = storage[100:124:2]
    views = [offset, overlapping, negated, stepped, permuted, batch_inner, flipped]
    for i, x in enumerate(views):
        check(Call(x, 3), grad[:, :6], backend)
        check(Call(x, 3, weight, weight.flip(0), views[i - 1]), grad, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "border", "dtype"),
    [
        ((1, 4, 640, 520), 2, 3, torch.float32),  # one image over several blocks
        ((1, 2, 511, 1021), 1, 2, torch.bfloat16),
        ((16, 32, 24, 25), 8, 32, torch.bfloat16),  # a batch over several threads
        ((2, 96, 64, 60), 32, 64, torch.float16),
    ],
)
def test_large(backend, layout, shape, groups, border, dtype):
    joined = (values(shape) + 5).to(dtype)
    c = shape[1]
    call = Call(
        arrange(joined[:, :border], layout),
        groups,
        values(c, torch.float32, seed=1),
        values(c, torch.float32, seed=2),
        arrange(joined[:, border:], layout) if border < c else None,
    )
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", range(16))
def test_only_some_inputs_want_gradients(backend, given):
    call = Call(
        *(
            values(s, torch.float32, seed=i) if s else 3
            for i, s in enumerate([(2, 4, 5, 6), None, (6,), (6,), (2, 2, 5, 6)])
        )
    )
    grad = values((2, 6, 5, 6), torch.float32, seed=9)
    expected = exact(call, grad)
    wanted = [name for bit, name in enumerate(NAMES) if given >> bit & 1]
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in zip(NAMES, call.inputs(), strict=True)}
    with use_backend(backend), poisoned_memory():
        y = group_norm_silu(leaves["x"], call.groups, leaves["weight"], leaves["bias"], skip=leaves["skip"])
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(grad)
    allowed = budgets(call, grad, backend)
    for name, leaf in leaves.items():
        if name in wanted:
            magnitude, operations = allowed[name]
            assert_within_budget(leaf.grad, expected[name], magnitude=magnitude, operations=operations)
        else:
            assert leaf.grad is None


def some_calls(count):
    """Returns calls of every kind, a few for each dtype, with their incoming gradients."""
    rng = random.Random(7)
    for i in range(count):
        dtype, layout = DTYPES[i % 4], LAYOUTS[i // 4 % 5]
        yield random_call(rng, dtype, layout, 5 * i)


@pytest.fixture
def restore_isa():
    best = core.isa()
    yield
    core.set_isa(best)


def all_isas():
    names = ("baseline", "avx2", "avx512", "avx512bf16")
    return names[: names.index(core.isa()) + 1]


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_every_instruction_set(restore_isa):
    for isa in all_isas():
        core.set_isa(isa)
        for call, grad in some_calls(60):
            check(call, grad, "native")
        for n, mean in [(31, 0.0), (64, 1e4), (1024, -1e6)]:  # tails of every vector length, and none
            x = values((2, 4, 3, n), torch.float32) + mean
            for layout in ("contiguous", "channels_last"):
                check(Call(arrange(x, layout), 2), values(x.shape, torch.float32, seed=1), "native")
        huge = group_norm_silu(values((1, 4, 8, 8), torch.float32), 2, torch.full((4,), 1e38))
        assert -0.3 < huge.min() <= 0  # silu is nowhere below -0.28
        weight, bias = torch.tensor([1e3, -1e3, 90.0, 2e-3]), torch.tensor([-1e3, 1e3, -88.0, 0.0])
        x = values((1, 4, 16, 17), torch.float32)
        check(Call(x, 2, weight, bias), values(x.shape, torch.float32, seed=1), "native")


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_the_bits(restore_threads, layout, dtype):
    for shape, groups, border in [
        ((1, 32, 190, 190), 8, 20),
        ((5, 12, 17, 19), 3, 12),
        ((3, 1, 301, 299), 1, 1),
        ((2, 64, 3, 3), 32, 40),
    ]:
        joined, c = values(shape, dtype), shape[1]
        skip = arrange(joined[:, border:], layout) if border < c else None
        parameters = (values(c, torch.float32, seed=1), values(c, torch.float32, seed=2))
        call = Call(arrange(joined[:, :border], layout), groups, *parameters, skip)
        grad = values(shape, dtype, seed=3)
        results = []
        for threads in (2, 1, 5, 2):
            torch.set_num_threads(threads)
            with use_backend("native"), poisoned_memory():
                results.append(run(call, grad))
        for other in results[1:]:
            assert same_bits(results[0], other)


def test_runs_give_the_same_bits():
    for call, grad in some_calls(20):
        with use_backend("native"):
            first = run(call, grad)
            torch.empty(1 << 18).fill_(float("nan"))  # other memory to allocate from
            assert same_bits(first, run(call, grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_is_not_rounded_through_bfloat16(backend, layout):
    x, skip = (arrange(values((2, 8, 6, 7), torch.float16, seed=i), layout) for i in range(2))
    call = Call(x, 2, values(16, torch.float16, seed=2), values(16, torch.float16, seed=3), skip)
    for value in check(call, arrange(values((2, 16, 6, 7), torch.float16, seed=4), layout), backend).values():
        # the last three of its 11 bits are zero in one of eight cases
        assert (value.bfloat16() != value).double().mean() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend):
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = values((2, 8, 6, 7), dtype).requires_grad_()
        for autocast in (torch.bfloat16, torch.float16):
            with use_backend(backend):
                with torch.autocast("cpu", autocast):
                    y = group_norm_silu(x, 2, weight, bias)
                assert y.dtype == dtype
                gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
                plain = group_norm_silu(x, 2, weight, bias)
            assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
            assert torch.equal(y, plain)


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_norm_silu("x", 2), TypeError, "x is a str; a torch.Tensor is needed"),
        (
            lambda: group_norm_silu(X.int(), 2),
            TypeError,
            "x has dtype torch.int32; allowed: float32, float64",
        ),
        (
            lambda: group_norm_silu(X.to_sparse(), 2),
            TypeError,
            "x is torch.sparse_coo; a dense (strided) tensor",
        ),
        (lambda: group_norm_silu(torch.nested.nested_tensor([X[0]]), 2), TypeError, "x is nested; a dense"),
        (lambda: group_norm_silu(X[0, 0, 0], 2), ValueError, "x has 1 dimensions; at least 2 are needed"),
        (lambda: group_norm_silu(X, 2, skip=1.0), TypeError, "skip is a float; a torch.Tensor is needed"),
        (
            lambda: group_norm_silu(X, 2, skip=X.double()),
            TypeError,
            "skip has dtype torch.float64; allowed: x's, torch.float32",
        ),
        (
            lambda: group_norm_silu(X, 2, skip=X[:1]),
            ValueError,
            "skip has shape (1, 6, 4, 4); all but the channels must be as in x, (2, 6, 4, 4)",
        ),
        (lambda: group_norm_silu(X, 2, skip=X[..., :3]), ValueError, "skip has shape (2, 6, 4, 3); all but"),
        (lambda: group_norm_silu(X, 2, skip=X[..., 0]), ValueError, "skip has shape (2, 6, 4); all but"),
        (lambda: group_norm_silu(X, 2.0), TypeError, "num_groups is 2.0; an integer is needed"),
        (lambda: group_norm_silu(X, True), TypeError, "num_groups is True; an integer is needed"),
        (lambda: group_norm_silu(X, 4), ValueError, "num_groups is 4; it must divide the 6 channels"),
        (
            lambda: group_norm_silu(X, 5, skip=X),
            ValueError,
            "num_groups is 5; it must divide the 12 channels",
        ),
        (lambda: group_norm_silu(X, 0), ValueError, "num_groups is 0; it must divide the 6 channels"),
        (lambda: group_norm_silu(X, -2), ValueError, "num_groups is -2; it must divide the 6 channels"),
        (lambda: group_norm_silu(X[:, :0], 2), ValueError, "num_groups is 2; it must divide the 0 channels"),
        (lambda: group_norm_silu(X, 2, eps=0.0), ValueError, "eps is 0.0; a positive number is needed"),
        (lambda: group_norm_silu(X, 2, eps=-1e-6), ValueError, "eps is -1e-06; a positive number is needed"),
        (lambda: group_norm_silu(X, 2, eps=float("nan")), ValueError, "eps is nan; a positive number"),
        (lambda: group_norm_silu(X, 2, [1.0] * 6), TypeError, "weight is a list; a torch.Tensor is needed"),
        (lambda: group_norm_silu(X, 2, torch.ones(5)), ValueError, "weight has shape (5,); (6,) is needed"),
        (lambda: group_norm_silu(X, 2, torch.ones(6), skip=X), ValueError, "weight has shape (6,); (12,) is"),
        (
            lambda: group_norm_silu(X, 2, torch.ones(6, 1)),
            ValueError,
            "weight has shape (6, 1); (6,) is needed",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(7)),
            ValueError,
            "bias has shape (7,); (6,) is needed",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(6).bool()),
            TypeError,
            "bias has dtype torch.bool; allowed: float32",
        ),
        (
            lambda: group_norm_silu(X, 2, torch.ones(6, device="meta")),
            ValueError,
            "weight is on meta; allowed: x's device, cpu",
        ),
        (
            lambda: group_norm_silu(X, 2, bias=torch.ones(6, device="meta")),
            ValueError,
            "bias is on meta; allowed: x's device, cpu",
        ),
        (
            lambda: group_norm_silu(X, 2, skip=X.to("meta")),
            ValueError,
            "skip is on meta; allowed: x's device, cpu",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
