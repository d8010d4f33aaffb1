"""The helpers that compare group_norm_silu with torch in float64, and the error budget."""

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory, shapes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "skip", "weight", "bias")

# The error budget in half units in the last place of the arithmetic's type, by a first-order analysis. Its magnitudes
# are made of Z = |xhat weight| + |bias|:
#
# - z = (x - mean) rstd weight + bias has 8 roundings: 2 of the difference (of the mean kept as two floats, or of the
#   difference itself), 2 of the factor rstd weight, 2 of the weight and the bias when they are brought to the
#   arithmetic's type, and those of the product and the sum. Its error is relative to Z.
# - The sigmoid s has 10 roundings: 1 for the scaling of its argument by log2(e), whose effect |z| s (1 - s) is below a
#   quarter; 4 for a Horner polynomial and the scaling by 2^n; 1 for 1 + e; and 4 for the reciprocal, which is right
#   "to the last place or two".
# - y = z s has a slope of at most 1.1, so it loses 1.1 * 8 + 10 + 1 < FORWARD, relative to Z. (It loses at most 1 if
#   z -> y is exact, because |silu(z)| <= |z|.)
FORWARD = 20
# - silu'(z) = s (1 + z (1 - s)) is below 1.1. It loses 10 for s, 10 again for 1 - s (whose factor z s is at most |z|),
#   4 for its own arithmetic, and the 8 of z times |silu''| <= 1/2. The product with the incoming gradient loses 1.
#   So the error of h = grad silu'(z) is at most 25 (1 + Z) |grad|, and H = (1 + Z) |grad| is the magnitude of which
#   those of all gradients are made.
# - grad_bias = sum h. In grad_weight = sum h xhat, xhat loses 4 and the product 1.
# - grad_x = rstd (weight h - mean(weight h) - xhat mean(weight h xhat)) loses 8 for the products, 3 for the sums and 2
#   for the divisions.
BACKWARD = 25 + 13
# Roundings of the longest chain of additions, which affect the mean, rstd (by half) and the sums of the gradients:
#
# - The reference's torch.sum adds in cascades: four levels of at most 16 for up to 2^20 values, then 4 vectors of 8
#   lanes, then the images (at most 16) one after another. The division adds 1. Its mean loses digits of |mean|.
# - native does at most 128 additions before the sums become float64, and 4 more operations for a chunk's mean and its
#   square. The sums are about a shift, the mean of an eighth of the chunk. The sum of squares about the shift is up to
#   `spread` times the sum about the mean: 2 times if that eighth is like the rest, and at most 9 times. So |x - shift|,
#   on which the error of the mean depends, is sqrt(spread) standard deviations on average.
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


def some_calls(count):
    """Returns calls of every kind, a few for each dtype, with their incoming gradients."""
    rng = random.Random(7)
    for i in range(count):
        dtype, layout = DTYPES[i % 4], LAYOUTS[i // 4 % 5]
        yield random_call(rng, dtype, layout, 5 * i)


# Tests cannot import from a conftest.py, so they get these helpers from fixtures.


@pytest.fixture(scope="session", name="make_call")
def _make_call():
    return Call


@pytest.fixture(scope="session", name="values")
def _values():
    return values


@pytest.fixture(scope="session", name="run")
def _run():
    return run


@pytest.fixture(scope="session", name="exact")
def _exact():
    return exact


@pytest.fixture(scope="session", name="budgets")
def _budgets():
    return budgets


@pytest.fixture(scope="session", name="check")
def _check():
    return check


@pytest.fixture(scope="session", name="random_call")
def _random_call():
    return random_call


@pytest.fixture(scope="session", name="some_calls")
def _some_calls():
    return some_calls


@pytest.fixture(scope="session", name="forward_roundings")
def _forward_roundings():
    """Returns the number of roundings of y, apart from those of the statistics."""
    return FORWARD
