"""Compares the 3x3 convolution in bfloat16 with torch in float64, and calls that PyTorch serves with PyTorch."""

import random

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import conv3x3, use_backend
from litevae_kernels.arithmetic import widened
from litevae_kernels.conv3x3 import dispatch
from litevae_kernels.nn import Conv3x3
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

# Winograd's transforms (csrc/conv3x3/cpu.cpp)
B = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
A = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)

BF16 = 2**16  # units in the last place of float32 in one of bfloat16


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch):
    """Makes the kernels serve small images as well, so that the tests are fast."""
    monkeypatch.setattr(dispatch, "LEAST_PIXELS_BFLOAT16", 1)


def values(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def channels_innermost(x, layout):
    """Returns `x` with channels innermost: dense, as a slice of a larger tensor of NaN, or with one image for all."""
    if layout == "sliced":
        n, c, h, w = x.shape
        big = torch.full((n, h + 3, w + 5, c + 7), float("nan"), dtype=x.dtype)
        view = big[:, 2 : 2 + h, 3 : 3 + w, 1 : 1 + c].permute(0, 3, 1, 2)
        view.copy_(x)
        return view
    dense = x.contiguous(memory_format=torch.channels_last)
    return dense[:1].expand(x.shape) if layout == "expanded" else dense


def winograd(x, weight, absolute):
    """Returns the convolution by F(2x2, 3x3) in float64.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).
        absolute: "factors" multiplies the absolute values of both transformed factors, which bounds the effect of
            their roundings. "inputs" also transforms the absolute values of x, which bounds the effect of its
            roundings. None gives the convolution itself.
    """
    height, width = x.shape[2:]
    inputs = transformed_inputs(x, absolute == "inputs")
    factors = G @ weight @ G.T
    a = A
    if absolute is not None:
        inputs, factors, a = inputs.abs(), factors.abs(), A.abs()
    y = a @ torch.einsum("ncyxij,ocij->noyxij", inputs, factors) @ a.T
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def transformed_inputs(x, absolute):
    """Returns the transformed tiles, (N, C, tile rows, tile columns, 4, 4)."""
    height, width = x.shape[2:]
    tiles = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2)).unfold(2, 4, 2).unfold(3, 4, 2)
    b = B.abs() if absolute else B
    return b @ (tiles.abs() if absolute else tiles) @ b.T


def winograd_weight_gradient(x, grad, absolute):
    """Returns the gradient of `winograd` with respect to its weight, with the same `absolute`."""
    height, width = x.shape[2:]
    tiles = F.pad(grad, (0, width % 2, 0, height % 2)).unfold(2, 2, 2).unfold(3, 2, 2)
    a, g = A, G
    inputs = transformed_inputs(x, absolute == "inputs")
    if absolute == "inputs":
        a, tiles = A.abs(), tiles.abs()
    gradients = a.T @ tiles @ a
    if absolute is not None:
        inputs, gradients, g = inputs.abs(), gradients.abs(), G.abs()
    return g.T @ torch.einsum("ncyxij,noyxij->ocij", inputs, gradients) @ g


def check(x, weight, bias, residual, silu):
    x = x.detach().to(torch.bfloat16)
    with poisoned_memory():
        actual = conv3x3(x, weight, bias, residual=residual, silu_input=silu)
    assert actual.dtype == torch.bfloat16
    assert actual.is_contiguous(memory_format=torch.channels_last)
    wide, weight = (F.silu(x.double()) if silu else x.double()), weight.double()
    exact = F.conv2d(wide, weight, padding=1)
    # Both factors are rounded to bfloat16. In comparison, the sums and transforms in float32 lose little.
    magnitude = 2 * BF16 * winograd(wide, weight, "factors")
    rough = winograd(wide, weight, "inputs")
    magnitude += (torch.tensor(weight[0].numel() + 40) + (BF16 if silu else 0)) * rough
    for added in (None if bias is None else bias[:, None, None], residual):
        if added is not None:
            exact, magnitude = exact + added.double(), magnitude + 4 * added.double().abs()
    assert_within_budget(actual, exact, magnitude=magnitude, operations=1)
    return actual


def test_the_oracle_is_a_convolution():
    x, weight = values(2, 3, 7, 4, dtype=torch.float64), values(5, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(winograd(x, weight, None), F.conv2d(x, weight, padding=1))


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_within_the_budget(layout, silu):
    rng = random.Random(f"{layout} {silu}")
    for seed in range(55):
        batch, inputs, outputs = rng.randint(1, 3), rng.randint(32, 100), rng.randint(32, 150)
        sizes = [(rng.randint(1, 20), rng.randint(1, 20)), (1, 1), (2, rng.randint(1, 300))]
        height, width = rng.choice(sizes)
        x = channels_innermost(values(batch, inputs, height, width, seed=seed), layout)
        weight = values(outputs, inputs, 3, 3, dtype=torch.bfloat16, seed=seed + 1) * inputs**-0.5 / 3
        bias = values(outputs, dtype=torch.bfloat16, seed=seed + 2) if rng.random() < 0.5 else None
        residual = values(batch, outputs, height, width, seed=seed + 3) if rng.random() < 0.5 else None
        if residual is not None:
            residual = channels_innermost(residual, rng.choice(["channels_last", "sliced"]))
        if rng.random() < 0.5:
            weight = weight.contiguous(memory_format=torch.channels_last)
        check(x, weight, bias, residual, silu)


@pytest.mark.usefixtures("needs_kernel")
def test_large_mean_and_wide_images():
    x = channels_innermost(values(1, 64, 40, 130) + 30, "channels_last")
    check(x, values(32, 64, 3, 3, seed=1), values(32, seed=2), None, False)


@pytest.mark.usefixtures("needs_kernel")
def test_zero_images_and_zero_weights():
    weight = values(48, 64, 3, 3)
    assert conv3x3(channels_innermost(values(0, 64, 5, 4), "channels_last"), weight).shape == (0, 48, 5, 4)
    x = channels_innermost(values(2, 64, 5, 4), "channels_last")
    assert not conv3x3(x, torch.zeros_like(weight)).any()


@pytest.mark.usefixtures("needs_kernel")
def test_the_same_bits_for_any_number_of_threads():
    x = channels_innermost(values(2, 64, 33, 29), "channels_last")
    weight, residual = (
        values(96, 64, 3, 3, seed=1),
        channels_innermost(values(2, 96, 33, 29), "channels_last"),
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(conv3x3(x, weight, residual=residual, silu_input=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("needs_kernel")
def test_a_stack_of_images_is_each_image_by_itself():
    x, weight = channels_innermost(values(5, 32, 17, 23), "channels_last"), values(64, 32, 3, 3, seed=1)
    together = conv3x3(x, weight)
    assert torch.equal(together, torch.cat([conv3x3(image[None], weight) for image in x]))


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("residual", [False, True])
def test_under_autocast(residual):
    """Float32 parameters are rounded first, as in PyTorch's convolution under autocast."""
    x = channels_innermost(values(2, 48, 9, 7, dtype=torch.float32), "channels_last")
    weight, bias = values(64, 48, 3, 3, dtype=torch.float32, seed=1), values(64, dtype=torch.float32, seed=2)
    added = values(2, 64, 9, 7, dtype=torch.float32, seed=3) if residual else None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = check(x, weight.bfloat16(), bias.bfloat16(), added, False)
        assert torch.equal(y, conv3x3(x, weight, bias, residual=added))
        assert torch.equal(
            y, conv3x3(x, weight.contiguous(memory_format=torch.channels_last), bias, residual=added)
        )
        assert conv3x3(x.double(), weight.double()).dtype == torch.float64


def check_gradients(x, weight, bias, residual, grad, silu=False):
    """Compares gradients with float64, and checks that computing them does not change the result."""
    inputs = [x, weight, bias, residual]
    with torch.no_grad():
        alone = conv3x3(F.silu(x) if silu else x, weight, bias, residual=residual)
    wanted = [t.requires_grad_() for t in inputs if t is not None]
    y = conv3x3(x, weight, bias, residual=residual, silu_input=silu)
    assert torch.equal(y, alone)
    with poisoned_memory():
        gradients = iter(torch.autograd.grad(y, wanted, grad))
    grad_x, grad_weight, grad_bias, grad_residual = (None if t is None else next(gradients) for t in inputs)
    assert grad_x.dtype == x.dtype
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
    assert grad_weight.dtype == weight.dtype
    assert grad_weight.stride() == weight.stride()

    wide, wide_grad = x.detach().to(torch.bfloat16).double(), grad.to(torch.bfloat16).double()
    slope = 1.0
    if silu:
        s = wide.sigmoid()
        slope, wide = s * (1 + wide * (1 - s)), F.silu(wide).bfloat16().double()
    turned = weight.detach().bfloat16().double().transpose(0, 1).flip(2, 3)
    exact = F.conv2d(wide_grad, turned, padding=1)
    magnitude = 2 * BF16 * winograd(wide_grad, turned, "factors")
    magnitude += (turned[0].numel() + 40) * winograd(wide_grad, turned, "inputs")
    if silu:  # The result is rounded before it is multiplied by the slope, which is computed in float32.
        magnitude = magnitude + 3 * BF16 * exact.abs()
    exact, magnitude = exact * slope, magnitude * (abs(slope) + 1e-5 if silu else 1)
    assert_within_budget(grad_x, exact, magnitude=magnitude, operations=1)

    exact = winograd_weight_gradient(wide, wide_grad, None)
    magnitude = 2 * BF16 * winograd_weight_gradient(wide, wide_grad, "factors")
    terms = x.shape[0] * x.shape[2] * x.shape[3]
    magnitude += (terms + 40) * winograd_weight_gradient(wide, wide_grad, "inputs")
    assert_within_budget(grad_weight, exact, magnitude=magnitude, operations=1)
    if bias is not None:
        assert grad_bias.dtype == bias.dtype
        sums = wide_grad.sum((0, 2, 3)), wide_grad.abs().sum((0, 2, 3))
        assert_within_budget(grad_bias, sums[0], magnitude=sums[1], operations=terms)
    if residual is not None:
        assert torch.equal(grad_residual, grad.to(torch.bfloat16).to(residual.dtype).expand_as(residual))


def test_the_oracle_of_the_weights_gradient():
    x, grad = values(2, 3, 7, 4, dtype=torch.float64), values(2, 5, 7, 4, dtype=torch.float64, seed=1)
    expected = torch.nn.grad.conv2d_weight(x, (5, 3, 3, 3), grad, padding=1)
    torch.testing.assert_close(winograd_weight_gradient(x, grad, None), expected)


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "contiguous"])
def test_gradients_within_the_budget(layout, memory_format):
    rng = random.Random(f"{layout} {memory_format}")
    for seed in range(20):
        batch, inputs, outputs = rng.randint(1, 3), rng.randint(32, 150), rng.randint(32, 100)
        sizes = [(rng.randint(1, 20), rng.randint(1, 20)), (1, 1), (2, rng.randint(1, 300))]
        height, width = rng.choice(sizes)
        x = channels_innermost(values(batch, inputs, height, width, seed=seed), "channels_last")
        weight = values(outputs, inputs, 3, 3, seed=seed + 1) * inputs**-0.5 / 3
        bias = values(outputs, seed=seed + 2) if rng.random() < 0.5 else None
        residual = values(batch, outputs, height, width, seed=seed + 3) if rng.random() < 0.5 else None
        grad = values(batch, outputs, height, width, seed=seed + 4)
        if layout != "contiguous":
            grad = channels_innermost(grad, layout)
        check_gradients(x, weight.contiguous(memory_format=memory_format), bias, residual, grad)


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_under_autocast(silu, memory_format):
    x = channels_innermost(values(2, 48, 9, 7, dtype=torch.float32), "channels_last").bfloat16().float()
    weight = values(64, 48, 3, 3, dtype=torch.float32, seed=1).contiguous(memory_format=memory_format)
    bias, residual = (
        values(64, dtype=torch.float32, seed=2),
        values(2, 64, 9, 7, dtype=torch.float32, seed=3),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_gradients(x, weight, bias, residual, values(2, 64, 9, 7, seed=4), silu)


@pytest.mark.usefixtures("needs_kernel")
def test_gradients_of_several_chunks_of_tiles():
    x, grad = (channels_innermost(values(1, 32, 80, 130, seed=seed), "channels_last") for seed in (0, 1))
    check_gradients(x, values(32, 32, 3, 3, seed=2) / 17, None, None, grad)


@pytest.mark.usefixtures("needs_kernel")
def test_gradients_have_the_same_bits_for_any_number_of_threads():
    x, grad = (channels_innermost(values(2, 64, 33, 29, seed=seed), "channels_last") for seed in (0, 1))
    weight, before = values(64, 64, 3, 3, dtype=torch.float32, seed=1), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(torch.ops.litevae.conv3x3_weight_gradient(x, grad, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def by_torch(*tensors, silu):
    """Returns PyTorch's convolution, in float32 if the CPU does not multiply the dtype."""

    def convolve(x, weight, bias, residual):
        y = F.conv2d(F.silu(x) if silu else x, weight, bias, padding=1)
        return y if residual is None else y + residual

    return widened(convolve, *tensors)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_other_calls_are_torchs(dtype, layout, silu):
    """PyTorch serves float64, small images, narrow layers, and all calls of the reference."""
    channels = 4 if dtype == torch.bfloat16 and layout == "channels_last" else 40
    x = arrange(values(2, channels, 6, 5, dtype=dtype), layout)
    weight, bias = values(36, channels, 3, 3, dtype=dtype, seed=1), values(36, dtype=dtype, seed=2)
    residual = values(2, 36, 6, 5, dtype=dtype, seed=3)
    expected = by_torch(x, weight, bias, residual, silu=silu)
    assert torch.equal(conv3x3(x, weight, bias, residual=residual, silu_input=silu), expected)
    with use_backend("reference"):
        assert torch.equal(conv3x3(x, weight, bias, residual=residual, silu_input=silu), expected)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_are_torchs(wanted):
    tensors = [
        values(2, 32, 6, 5),
        values(32, 32, 3, 3, seed=1),
        values(32, seed=2),
        values(2, 32, 6, 5, seed=3),
    ]
    tensors[wanted].requires_grad_()  # in x, pixels are innermost
    y = conv3x3(*tensors[:3], residual=tensors[3], silu_input=True)
    if (
        tensors[0].requires_grad or tensors[1].requires_grad
    ):  # the backward pass keeps SiLU's result, in x's dtype
        expected = by_torch(F.silu(tensors[0]), *tensors[1:], silu=False)
    else:
        expected = by_torch(*tensors, silu=True)
    assert torch.equal(y, expected)
    grad = values(*y.shape, seed=4)
    assert torch.equal(*(torch.autograd.grad(result, tensors[wanted], grad)[0] for result in (y, expected)))


def call(**changes):
    arguments = {"x": values(2, 32, 6, 5), "weight": values(32, 32, 3, 3), "bias": values(32)} | changes
    return conv3x3(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1}, TypeError, "x is a int"),
        ({"x": torch.zeros(1, 32, 4, 4, dtype=torch.int8)}, TypeError, "x has dtype torch.int8"),
        ({"x": values(32, 6, 5)}, ValueError, "x has 3 dimensions; 4 are needed"),
        ({"weight": values(32, 32, 1, 1)}, ValueError, r"\(32, 32, 1, 1\); \(C_out, 32, 3, 3\) is needed"),
        ({"weight": values(32, 16, 3, 3)}, ValueError, r"\(32, 16, 3, 3\); \(C_out, 32, 3, 3\) is needed"),
        ({"bias": values(16)}, ValueError, r"bias has shape \(16,\); \(32,\) is needed"),
        ({"residual": values(2, 32, 5, 6)}, ValueError, r"residual has shape \(2, 32, 5, 6\)"),
        (
            {"weight": values(32, 32, 3, 3, dtype=torch.float32)},
            TypeError,
            "weight has dtype .* the same dtype",
        ),
        (
            {"bias": values(32, dtype=torch.float64)},
            TypeError,
            r"bias has dtype torch.float64; .* torch.bfloat16",
        ),
        ({"x": values(2, 32, 0, 5)}, ValueError, "all sizes but the batch must be at least 1"),
        ({"silu_input": torch.ones(2)}, TypeError, "silu_input is a Tensor; True or False is needed"),
        ({"x": values(2, 32, 6, 5).to("meta")}, ValueError, "weight is on cpu; allowed: x's device, meta"),
        (
            {"weight": values(32, 32, 3, 3).to("meta")},
            ValueError,
            "weight is on meta; allowed: x's device, cpu",
        ),
        ({"bias": values(32).to("meta")}, ValueError, "bias is on meta; allowed: x's device, cpu"),
        (
            {"residual": values(2, 32, 6, 5).to("meta")},
            ValueError,
            "residual is on meta; allowed: x's device",
        ),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.usefixtures("needs_kernel")
def test_small_images_are_torchs(monkeypatch):
    monkeypatch.undo()
    x, weight = channels_innermost(values(9, 32, 8, 15), "channels_last"), values(32, 32, 3, 3)
    assert torch.equal(conv3x3(x, weight), F.conv2d(x, weight, padding=1))


def test_exports_to_pytorchs_own_operators():
    x = channels_innermost(values(2, 32, 9, 7), "channels_last")
    with torch.no_grad():
        exported = torch.export.export(Conv3x3(32, 48, silu_input=True).bfloat16(), (x,), strict=True)
    assert "litevae" not in str(exported.graph)


def test_vmap_over_the_residual():
    x, weight, residuals = values(1, 4, 3, 3), values(5, 4, 3, 3, seed=1), values(6, 1, 5, 3, 3, seed=2)
    y = torch.func.vmap(lambda residual: conv3x3(x, weight, residual=residual))(residuals)
    assert torch.equal(y, torch.stack([conv3x3(x, weight, residual=residual) for residual in residuals]))
