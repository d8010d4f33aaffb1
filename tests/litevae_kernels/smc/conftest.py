"""The helpers that compare modulate_weight with Equation 3 in float64, and the error budget."""

import random
from typing import NamedTuple

import pytest
import torch

from litevae_kernels import modulate_weight, use_backend
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("weight", "scale", "gain")

# The error budget in half units in the last place of the arithmetic's type, by a first-order analysis:
#
# - v = scale w has three roundings, including those of the inputs to the arithmetic's type. A sum of squares loses
#   `chain` and the rounding of the squares, and its root loses half of that. With the storing of the norm, + eps, the
#   division, the gain and the product, w' = gain v / (norm + eps) loses 10 + chain / 2, relative to w' itself.
# - dv = gain (g / d - v sum(g v) / (norm d^2)) with d = norm + eps: each term loses 8, besides the norms (three of
#   them in the second term) and the sum. grad_weight = scale dv, grad_scale = sum w dv and grad_gain = sum g v / d lose
#   2 more, besides their sums.
OPERATIONS = 20
# Roundings of the longest chain of additions:
#
# - native adds up at most 64 elements of a filter in each of 16 lanes, and their sums in float64. For grad_scale it
#   adds up the taps of one input channel, and their sums in float64.
# - The reference adds one element after another, at worst: vector_norm those of a filter, autograd those of all
#   filters and taps.
NATIVE_CHAIN = 64


class Call(NamedTuple):
    weight: torch.Tensor
    scale: torch.Tensor
    gain: torch.Tensor | None = None
    eps: float = 1e-8
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None

    def inputs(self):
        return {n: t for n, t in zip(NAMES, self[:3], strict=True) if t is not None}


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def run(call, grad):
    leaves = {n: t.detach().requires_grad_() for n, t in call.inputs().items()}
    modulated = modulate_weight(
        leaves["weight"],
        leaves["scale"],
        leaves.get("gain"),
        eps=call.eps,
        dtype=call.dtype,
        memory_format=call.memory_format,
    )
    gradients = torch.autograd.grad(modulated, list(leaves.values()), grad)
    return {"modulated": modulated.detach(), **dict(zip(leaves, gradients, strict=True))}


def equation_3(weight, scale, gain, eps):
    filters, inputs = weight.shape[:2]
    group = torch.arange(filters) // (filters // (len(scale) // inputs))
    v = weight * scale[group[:, None] * inputs + torch.arange(inputs)][:, :, None, None]
    square = v.square().sum((1, 2, 3), keepdim=True)
    # At zero, the slope of the root is infinite, but that of v / (|v| + eps) is 1 / eps.
    norm = square.where(square > 0, 1).sqrt() * (square > 0)
    return v / (norm + eps) * (1 if gain is None else gain)


def exact(call, grad):
    leaves = {n: t.detach().double().requires_grad_() for n, t in call.inputs().items()}
    modulated = equation_3(leaves["weight"], leaves["scale"], leaves.get("gain"), call.eps)
    gradients = torch.autograd.grad(modulated, list(leaves.values()), grad.double())
    return {"modulated": modulated.detach(), **dict(zip(leaves, gradients, strict=True))}


def budgets(call, grad, backend):
    """Returns for w' and each gradient the magnitude of each element, and the number of roundings (see above)."""
    weight, scale, g = (t.detach().double().abs() for t in (call.weight, call.scale, grad))
    gain = 1.0 if call.gain is None else call.gain.double().abs()
    filters, inputs = weight.shape[:2]
    groups = len(scale) // inputs
    spread = scale.view(groups, 1, inputs, 1, 1).expand(-1, filters // groups, -1, -1, -1)
    spread = spread.reshape(filters, inputs, 1, 1)
    v = spread * weight
    norm = v.square().sum((1, 2, 3), keepdim=True).sqrt()
    d = norm + call.eps
    along = (g * v).sum((1, 2, 3), keepdim=True)
    dv = gain * (g / d + (v * along / (norm * d**2)).nan_to_num())
    magnitudes = {
        "modulated": gain * v / d,
        "weight": spread * dv,
        "scale": (weight * dv).sum((2, 3)).view(groups, -1, inputs).sum(1).flatten(),
        "gain": (along / d).sum().view(1),
    }
    # A chain is not longer than the number of values.
    chain, across = min(NATIVE_CHAIN, weight[0].numel() // 16 + 1), weight[0, 0].numel()
    if backend == "reference":
        chain, across = weight[0].numel(), weight.numel()
    chains = {"modulated": chain, "weight": 2 * chain, "scale": 2 * chain + across, "gain": chain + across}
    return {n: (m, OPERATIONS + chains[n]) for n, m in magnitudes.items()}


def check(call, grad, backend):
    """Compares a call on `backend` with float64, and returns the results of `backend`."""
    before = [t.clone() for t in (*call.inputs().values(), grad)]
    with use_backend(backend), poisoned_memory():
        actual = run(call, grad)
    for a, b in zip((*call.inputs().values(), grad), before, strict=True):
        assert torch.equal(a, b)  # Inputs are not written.
    expected = exact(call, grad)
    allowed = budgets(call, grad, backend)
    in_double = torch.float64 in (call.weight.dtype, call.dtype)
    for name, value in actual.items():
        dtype = call.dtype or call.weight.dtype if name == "modulated" else getattr(call, name).dtype
        assert value.dtype == dtype
        magnitude, operations = allowed[name]
        if value.dtype == torch.float64 and not in_double:
            value = value.float()  # The arithmetic was in float32.
        # The slope of a filter of zeros, 1 / eps, is too large for float16.
        beyond = expected[name].abs() > 1.001 * torch.finfo(value.dtype).max
        infinite = torch.full_like(value, float("inf")).copysign(expected[name])
        assert torch.equal(value[beyond], infinite[beyond])
        assert value.isinf().sum() == beyond.sum()
        try:
            assert_within_budget(
                value.masked_fill(beyond, 0),
                expected[name].masked_fill(beyond, 0),
                magnitude=magnitude,
                operations=operations,
            )
        except AssertionError as error:
            described = {n: (tuple(t.shape), t.dtype, t.stride()) for n, t in call.inputs().items()}
            raise AssertionError(f"{name}: {error}; eps {call.eps}, {described}") from error
    return actual


def random_call(rng, dtype, layout, seed):
    """Returns a call with random sizes, groups, dtypes and values, and a gradient of random layout."""
    groups = rng.choice([1, 1, 1, 2, 3])
    filters = groups * rng.choice([1, 1, 2, 3, 5, 8, 17, 40])
    inputs = rng.choice([1, 2, 3, 4, 7, 16, 33])
    taps = rng.choice([(1, 1), (3, 3), (1, 3), (5, 2), (7, 7)])
    weight = values((filters, inputs, *taps), seed=seed) * rng.choice([1.0, 0.05])
    scale = values((groups * inputs,), rng.choice(DTYPES), seed=seed + 1)
    if rng.random() < 0.3:
        scale = torch.stack([scale, scale], 1)[:, 0]  # a stride of 2
    if rng.random() < 0.2:
        scale[rng.randrange(len(scale))] = 0
    gain = values((1,), rng.choice(DTYPES), seed=seed + 2) if rng.random() < 0.6 else None
    call = Call(
        arrange(weight.to(dtype), layout),
        scale,
        gain,
        rng.choice([1e-8, 1e-8, 1e-4, 1.0]),
        rng.choice([None, *DTYPES]),
        rng.choice([None, torch.contiguous_format, torch.channels_last]),
    )
    grad = values(weight.shape, call.dtype or dtype, seed=seed + 3)
    return call, arrange(grad, rng.choice(LAYOUTS))


def some_calls(count):
    rng = random.Random(5)
    for i in range(count):
        yield random_call(rng, DTYPES[i % 4], LAYOUTS[i // 4 % 5], 4 * i)


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


@pytest.fixture(scope="session", name="equation_3")
def _equation_3():
    return equation_3


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


@pytest.fixture(scope="session", name="native_roundings")
def _native_roundings():
    """Returns the largest number of roundings of a modulated weight on the native backend."""
    return OPERATIONS + NATIVE_CHAIN
