"""Compares self_modulated_conv2d with Equation 3, StyleGAN3 and torch's convolution in float64."""

import random

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import modulate_weight, self_modulated_conv2d, use_backend
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory


def stylegan3(weight, style):
    """Returns the filters of StyleGAN3's modulated_conv2d with demodulation, for one sample."""
    # The pre-normalisation of both inputs cancels.
    w = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
    s = style * style.square().mean().rsqrt()
    w = w * s[None, :, None, None]
    return w * (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()


def test_equals_stylegan3s_grouped_convolution(values, native_roundings, backend):
    # StyleGAN3 turns the batch into groups, each of which has its own copy of the filters.
    x, weight, scale = values((3, 6, 9, 10)), values((8, 6, 3, 3), seed=1), values(6, seed=2)
    filters = stylegan3(weight, scale).repeat(3, 1, 1, 1)
    expected = F.conv2d(x.reshape(1, 18, 9, 10), filters, padding=1, groups=3).reshape(3, 8, 9, 10)
    with use_backend(backend):
        actual = self_modulated_conv2d(x, weight, scale, padding=1)
        narrow = self_modulated_conv2d(x.float(), weight.float(), scale.float(), padding=1)
    # Filters have norm 1. StyleGAN3 adds eps = 1e-8 to a squared norm of 54, this package to the norm.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    # There are 54 products and their sums, of filters that have been rounded already.
    assert_within_budget(
        narrow,
        expected,
        magnitude=F.conv2d(x.abs(), stylegan3(weight, scale).abs(), padding=1) + 1.0,
        operations=2 * 54 + native_roundings,
    )


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "dilation": (1, 2)},
    {"groups": 2, "padding": 1},
    {"groups": 6, "stride": 3},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("silu_input", [False, True])
def test_convolution_equals_torch_in_float64(
    make_call, values, equation_3, budgets, backend, options, silu_input
):
    groups = options.get("groups", 1)
    for dtype, parameter_dtype, layout in [
        (torch.float64, torch.float64, "contiguous"),
        (torch.float32, torch.float32, "channels_last"),
        (torch.float32, torch.bfloat16, "contiguous"),
        (torch.float32, torch.float64, "sliced"),
    ]:
        x = arrange(values((2, 6, 11, 12), dtype), layout)
        shapes = [(12, 6 // groups, 3, 3), (6,), (1,), (12,)]
        parameters = [values(shape, parameter_dtype, seed=i + 1) for i, shape in enumerate(shapes)]
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        with use_backend(backend), poisoned_memory():
            y = self_modulated_conv2d(*leaves, silu_input=silu_input, **options)
        grad = values(y.shape, dtype, seed=9)
        gradients = torch.autograd.grad(y, leaves, grad)
        wide = [t.detach().double().requires_grad_() for t in (x, *parameters)]
        source = F.silu(wide[0]) if silu_input else wide[0]
        modulated = equation_3(*wide[1:4], 1e-8)
        expected = F.conv2d(source, modulated, wide[4], **options)
        exact_gradients = torch.autograd.grad(expected, wide, grad.double())
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        # Each result is a sum of products, whose magnitude the convolution of absolute values gives.
        source, filters, bias = (t.detach().abs().requires_grad_() for t in (source, modulated, wide[4]))
        magnitude = F.conv2d(source, filters, bias, **options)
        through = torch.autograd.grad(magnitude, (source, filters, bias), grad.double().abs())
        call = make_call(*(t.detach() for t in leaves[1:4]))
        allowed = budgets(call, through[1], backend)
        # silu'(x) is below 1 + |x|, and so is its error.
        magnitudes = [magnitude.detach(), through[0] * (1 + x.double().abs())]
        magnitudes += [allowed[name][0] for name in call.inputs()] + [through[2]]
        # No sum of the convolution and its gradients is longer than 2 * 12 * 11 products. A SiLU loses 20.
        operations = 2 * 2 * 12 * 11 + 20 + max(n for _, n in allowed.values())
        for actual, value, size in zip(
            (y, *gradients), (expected, *exact_gradients), magnitudes, strict=True
        ):
            if actual.dtype == torch.float64:
                actual = actual.to(dtype)  # judged by the dtype of the arithmetic
            assert_within_budget(actual.detach(), value.detach(), magnitude=size, operations=operations)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_convolution_of_any_dtype(values, equation_3, backend, dtype):
    rng = random.Random(f"{backend} {dtype}")
    for seed in range(80):
        groups, kernel = rng.choice([1, 1, 2]), (rng.randint(1, 3), rng.randint(1, 3))
        inputs, outputs = groups * rng.randint(1, 5), groups * rng.randint(1, 5)
        options = {"stride": rng.randint(1, 2), "padding": rng.randint(0, 2), "groups": groups}
        size = (rng.randint(1, 2), inputs, rng.randint(3, 9), rng.randint(3, 9))
        x = arrange(values(size, dtype, seed=seed), rng.choice(LAYOUTS))
        weight = values((outputs, inputs // groups, *kernel), dtype, seed=seed + 1)
        scale, gain = values(inputs, dtype, seed=seed + 2), values(1, dtype, seed=seed + 3)
        bias = values(outputs, dtype, seed=seed + 4) if rng.random() < 0.5 else None
        silu, wide = rng.random() < 0.5, x.double()
        source = F.silu(wide) if silu else wide
        modulated = equation_3(*(t.double() for t in (weight, scale, gain)), 1e-8)
        exact = F.conv2d(source, modulated, None if bias is None else bias.double(), **options)
        magnitude = F.conv2d(
            source.abs(), modulated.abs(), None if bias is None else bias.double().abs(), **options
        )
        residual = values(exact.shape, dtype, seed=seed + 5) if rng.random() < 0.5 else None
        if residual is not None:
            exact, magnitude = exact + residual.double(), magnitude + residual.double().abs()
        with use_backend(backend), poisoned_memory():
            y = self_modulated_conv2d(
                x, weight, scale, gain, bias, residual=residual, silu_input=silu, **options
            )
        # The weight, the SiLU and the convolution are rounded to the storage's dtype before the residual is added.
        # Equation 3, the SiLU and the sum of at most 45 products are computed in float32.
        computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        operations = 3 * torch.finfo(dtype).eps / computed + (2 * 45 + 10) + 20 + 2 * 45
        assert y.dtype == dtype
        assert_within_budget(y, exact, magnitude=magnitude, operations=int(operations))


@pytest.mark.parametrize(
    ("residual", "error"), [(torch.ones(2, 3, 1, 1), ValueError), (torch.ones(2, 3, 6, 5).int(), TypeError)]
)
def test_bad_residual(values, residual, error):
    x, weight = values((2, 4, 6, 5), torch.float32), values((3, 4, 1, 1), torch.float32)
    with pytest.raises(error, match="residual has"):
        self_modulated_conv2d(x, weight, torch.ones(4), residual=residual)


def test_the_weight_is_rounded_once_from_wider_parameters(values, backend):
    x = values((2, 4, 6, 5), torch.bfloat16).requires_grad_()
    weight, scale = values((3, 4, 3, 3), torch.float32, seed=1), values(4, torch.float32, seed=2)
    gain, bias = values(1, torch.float32, seed=3), values(3, torch.float32, seed=4)
    leaves = [t.requires_grad_() for t in (weight, scale, gain, bias)]
    with use_backend(backend):
        y = self_modulated_conv2d(x, *leaves)
        gradients = torch.autograd.grad(y.float().sum(), [x, *leaves])
        modulated = modulate_weight(weight, scale, gain, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16] + [torch.float32] * 4
    assert torch.equal(y, F.conv2d(x, modulated, bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast(values, backend, dtype):
    x = values((2, 4, 6, 5), dtype).requires_grad_()
    leaves = [values(s, torch.float32, seed=i) for i, s in enumerate([(3, 4, 3, 3), (4,), (1,), (3,)], 1)]
    if dtype == torch.float64:
        leaves = [t.double() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    with use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            y = self_modulated_conv2d(x, *leaves, silu_input=True)
            modulated = modulate_weight(*leaves[:3])
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        assert modulated.dtype == leaves[0].dtype  # autocast does not change the function itself
        gradients = torch.autograd.grad(y.double().sum(), [x, *leaves])
    assert [g.dtype for g in gradients] == [dtype] + [leaves[0].dtype] * 4
    assert all(g.isfinite().all() for g in gradients)
