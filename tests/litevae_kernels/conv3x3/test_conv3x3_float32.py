"""Tests the float32 kernels of the 3x3 convolution, which every CPU has, under each of its instruction sets."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import conv3x3, self_modulated_conv2d, use_backend
from litevae_kernels.arithmetic import multiplies
from litevae_kernels.testing import LAYOUTS, Winograd, arrange, assert_within_budget, poisoned_memory

# The points of csrc/conv3x3/winograd.h. The kernels choose the tile by the shape; F(4x4, 3x3) has the larger bound.
WINOGRAD = Winograd(4, (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2))
# Roundings of a value on its way through the transforms: in two dimensions each, the inputs take 3 multiplications or
# sums, the taps 3, the outputs 4, and every constant is rounded itself; then come bias, residual and the reverse
# transform of the taps in the gradient.
TRANSFORMS = 2 * (3 + 3 + 4) * 2 + 4
SILU = 8  # roundings of the activation


@pytest.fixture(autouse=True)
def small_calls_too(monkeypatch):
    """Makes the kernels serve narrow and small images as well, so that the tests are fast."""
    for limit in ("LEAST_CHANNELS", "LEAST_PIXELS"):
        monkeypatch.setattr(sys.modules["litevae_kernels.conv3x3"], limit, 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request, isa):
    """Returns each dtype that the float32 kernels serve under an instruction set."""
    if request.param != torch.float32 and multiplies(request.param, isa):
        pytest.skip("this CPU multiplies the dtype, and other kernels or PyTorch serve it")
    return request.param


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def problem(rng, dtype, layout, *, largest=40):
    """Returns random x, weight, bias, residual and gradient; bias and residual may be None."""
    batch, inputs, outputs = rng.randint(1, 3), rng.randint(1, largest), rng.randint(1, largest)
    height, width = rng.choice([(rng.randint(1, 13), rng.randint(1, 19)), (2, rng.randint(1, 150)), (1, 1)])
    seed = rng.randrange(2**31)
    x = arrange(values(batch, inputs, height, width, dtype=dtype, seed=seed), layout)
    weight = (values(outputs, inputs, 3, 3, seed=seed + 1) * inputs**-0.5 / 3).to(dtype)
    bias = values(outputs, dtype=dtype, seed=seed + 2) if rng.random() < 0.5 else None
    added, grad = (values(batch, outputs, height, width, dtype=dtype, seed=seed + i) for i in (3, 4))
    added, grad = (arrange(t, rng.choice(LAYOUTS)) for t in (added, grad))
    return x, arrange(weight, rng.choice(LAYOUTS[:4])), bias, added if rng.random() < 0.5 else None, grad


def check(x, weight, bias, residual, silu):
    with poisoned_memory():
        actual = conv3x3(x, weight, bias, residual=residual, silu_input=silu)
    assert actual.dtype == x.dtype
    innermost = x.stride(1) == 1
    assert actual.is_contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)
    wide, taps = F.silu(x.double()) if silu else x.double(), weight.double()
    exact, magnitude = F.conv2d(wide, taps, padding=1), WINOGRAD.convolve(wide, taps, absolute=True)
    for added in (None if bias is None else bias[:, None, None], residual):
        if added is not None:
            exact, magnitude = exact + added.double(), magnitude + added.double().abs()
    operations = weight.shape[1] + TRANSFORMS + (SILU if silu else 0)
    assert_within_budget(actual, exact, magnitude=magnitude, operations=operations)
    return actual


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_within_the_budget(dtype, layout):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(12):
        x, weight, bias, residual, _ = problem(rng, dtype, layout)
        check(x, weight, bias, residual, silu=i % 2 == 1)


def check_gradients(x, weight, bias, residual, grad):
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = iter(leaves)
    x, weight, bias, residual = (None if t is None else next(given) for t in (x, weight, bias, residual))
    y = conv3x3(x, weight, bias, residual=residual)
    with poisoned_memory():
        gradients = torch.autograd.grad(y, leaves, grad)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
    grad_x, grad_weight, *rest = gradients
    innermost = x.stride(1) == 1
    assert grad_x.is_contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)
    assert grad_weight.stride() == torch.empty_like(weight).stride()

    wide, taps, wide_grad = (t.detach().double() for t in (x, weight, grad))
    turned = taps.transpose(0, 1).flip(2, 3)
    assert_within_budget(
        grad_x,
        F.conv2d(wide_grad, turned, padding=1),
        magnitude=WINOGRAD.convolve(wide_grad, turned, absolute=True),
        operations=weight.shape[0] + TRANSFORMS,
    )
    tiles = x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    assert_within_budget(
        grad_weight,
        torch.nn.grad.conv2d_weight(wide, weight.shape, wide_grad, padding=1),
        magnitude=WINOGRAD.weight_gradient(wide, wide_grad, absolute=True),
        operations=tiles + TRANSFORMS,
    )
    if residual is not None:
        assert torch.equal(rest.pop(), grad.expand_as(residual))
    if bias is not None:
        sums = wide_grad.sum((0, 2, 3)), wide_grad.abs().sum((0, 2, 3))
        assert_within_budget(rest.pop(), sums[0], magnitude=sums[1], operations=grad[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_within_the_budget(dtype, layout):
    rng = random.Random(f"{layout} {dtype} gradients")
    for _ in range(6):
        check_gradients(*problem(rng, dtype, layout))


def test_wide_layers_and_wide_images(isa):
    """There are several panels of channels, blocks of tiles, and chunks of tiles."""
    x, weight = values(1, 70, 40, 330), values(100, 70, 3, 3, seed=1) / 25
    for layout in ("contiguous", "channels_last"):
        if isa == "baseline" and layout == "contiguous":
            continue  # the slowest
        grad = arrange(values(1, 100, 40, 330, seed=2), layout)
        check_gradients(arrange(x, layout), weight, None, None, grad)


def test_a_large_mean(isa):
    x, weight = values(1, 33, 20, 30) + 30, values(20, 33, 3, 3, seed=1)
    check(x, weight, None, None, silu=False)


def test_no_images_no_weights(dtype):
    weight = values(48, 24, 3, 3, dtype=dtype).requires_grad_()
    for shape in ((0, 24, 5, 4), (2, 24, 0, 4), (2, 24, 5, 0)):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = conv3x3(x, weight)
        assert y.shape == (shape[0], 48, *shape[2:])
        grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
        assert grad_x.shape == shape
        assert not grad_weight.any()
    x = values(2, 24, 5, 4, dtype=dtype)
    assert not conv3x3(x, torch.zeros_like(weight)).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_any_batch(restore_threads, dtype, layout):
    x, residual, grad = (arrange(values(3, c, 21, 37, dtype=dtype, seed=c), layout) for c in (24, 40, 40))
    weight = values(40, 24, 3, 3, dtype=dtype, seed=1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = conv3x3(*leaves, residual=residual)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
    with torch.no_grad():
        alone = [conv3x3(x[i : i + 1], weight, residual=residual[i : i + 1]) for i in range(3)]
    assert torch.equal(results[0][0], torch.cat(alone))


@pytest.mark.parametrize("residual", [False, True])
def test_under_autocast(dtype, residual):
    """Float32 parameters are rounded first, as in PyTorch's convolution under autocast."""
    x, weight, bias = values(2, 24, 9, 7), values(32, 24, 3, 3, seed=1), values(32, seed=2)
    added = values(2, 32, 9, 7, seed=3) if residual else None
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype):
        y = conv3x3(*leaves, residual=added, silu_input=True)
    assert y.dtype == dtype
    rounded = None if added is None else added.to(dtype)
    silu = F.silu(x.to(dtype))
    assert torch.equal(y, conv3x3(silu, weight.to(dtype), bias.to(dtype), residual=rounded))
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("silu", [False, True])
def test_self_modulated_convolution_uses_the_same_kernels(dtype, silu):
    x, weight = values(2, 24, 9, 7, dtype=dtype), values(32, 24, 3, 3, dtype=dtype, seed=1)
    scale, gain = values(24, seed=2, dtype=dtype), torch.ones(1, dtype=dtype)
    modulated = self_modulated_conv2d(x, weight, scale, gain, padding=1, silu_input=silu)
    with use_backend("reference"):
        exact = self_modulated_conv2d(
            x.double(), weight.double(), scale.double(), gain.double(), padding=1, silu_input=silu
        )
    eps = torch.finfo(dtype).eps
    assert 0 < float((modulated.double() - exact).norm() / exact.norm()) < 8 * eps


def test_the_reference_backend_is_direct(dtype):
    x, weight = values(2, 24, 19, 17, dtype=dtype), values(32, 24, 3, 3, dtype=dtype, seed=1)
    with use_backend("reference"):
        direct = conv3x3(x, weight)
    assert torch.equal(direct, F.conv2d(x.float(), weight.float(), padding=1).to(dtype))
    assert not torch.equal(direct, conv3x3(x, weight)) or dtype != torch.float32
