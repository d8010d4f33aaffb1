"""Compares modulate_weight and self_modulated_conv2d with Equation 3 in float64, on every backend that runs here."""

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import modulate_weight, self_modulated_conv2d, use_backend
from litevae_kernels.tensors import memory_format_of
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

BACKENDS = ("reference", "native")
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


# 320 cases per backend: 4 dtypes x 5 layouts of the weight x 16. Everything else is random.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_equation_3_in_float64(backend, layout, dtype):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(16):
        seed = 1000 * LAYOUTS.index(layout) + 100 * DTYPES.index(dtype) + 4 * i
        call, grad = random_call(rng, dtype, layout, seed)
        actual = check(call, grad, backend)
        weight_last = layout == "channels_last" and call.weight.shape[1] > 1
        inherited = torch.channels_last if weight_last else torch.contiguous_format
        assert actual["modulated"].is_contiguous(memory_format=call.memory_format or inherited)
        if backend == "native":
            assert actual["weight"].is_contiguous(memory_format=inherited)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weight_and_gradient(backend, layout, grad_layout):
    weight, grad = (values((6, 5, 3, 4), torch.float32, seed=i) for i in range(2))
    for memory_format in (None, torch.contiguous_format, torch.channels_last):
        call = Call(
            arrange(weight, layout),
            values(10, torch.float32, seed=2),
            values(1, torch.float32, seed=3),
            memory_format=memory_format,
        )
        check(call, arrange(grad, grad_layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((64, 48, 3, 3), 1, torch.float32),
        ((33, 130, 3, 3), 1, torch.bfloat16),
        ((3, 1500, 1, 1), 1, torch.float32),  # longer than one float32 sum
        ((120, 7, 3, 3), 40, torch.float16),
        ((257, 1, 1, 1), 257, torch.float32),
    ],
)
def test_large(backend, layout, shape, groups, dtype):
    scale, gain = values(groups * shape[1], torch.float32, seed=1), values(1, torch.float32, seed=2)
    call = Call(arrange(values(shape, dtype), layout), scale, gain)
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 1, 1, 1), (1, 6, 1, 1), (1, 1, 3, 3), (2, 1, 1, 7)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_shapes(backend, shape, layout, dtype):
    call = Call(arrange(values(shape, dtype), layout), values(shape[1], seed=1).to(dtype))
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_filters_and_scales(backend, dtype):
    weight, grad = values((4, 3, 3, 3), dtype), values((4, 3, 3, 3), dtype, seed=1)
    weight[2] = 0
    gain = torch.tensor([1.5])
    actual = check(Call(weight, values(3, torch.float32, seed=2), gain), grad, backend)
    assert not actual["modulated"][2].any()
    assert actual["weight"].isfinite().all()
    actual = check(Call(weight, torch.zeros(3), gain), grad, backend)
    assert not actual["modulated"].any()
    assert not actual["weight"].any()  # The slope is scale * gain / eps.
    assert actual["scale"].isfinite().all()
    actual = check(Call(torch.zeros_like(weight), torch.ones(3)), grad, backend)
    assert not actual["modulated"].any()
    assert not actual["scale"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 1e-4),  # squares below float16, reciprocals beyond it
        (torch.float16, 1e-7),  # the smallest numbers of float16
        (torch.float16, 6e4),
        (torch.bfloat16, 1e-4),
        (torch.bfloat16, 1e17),
        (torch.float32, 1e-4),
        (torch.float32, 1e-12),  # far below eps
        (torch.float32, 1e-25),  # squares below float32
        (torch.float32, 1e17),
        (torch.float64, 1e-30),
        (torch.float64, 1e30),
    ],
)
def test_small_and_large_weights(backend, dtype, size):
    weight = (values((5, 4, 3, 3)).clamp(-1, 1) * size).to(dtype)
    grad = values(weight.shape, dtype, seed=1)
    gain = values(1, torch.float32, seed=3)
    call = Call(weight, values(4, torch.float32, seed=2), gain)
    actual = check(call, grad, backend)
    if size > 1e-6:
        norms = actual["modulated"].double().square().sum((1, 2, 3)).sqrt()
        torch.testing.assert_close(norms, gain.double().abs().expand(5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_own_filter_only(backend, bad):
    weight, scale = values((6, 4, 3, 3), torch.float32), values(4, torch.float32, seed=1)
    grad = values(weight.shape, torch.float32, seed=2)
    with use_backend(backend):
        clean = run(Call(weight, scale), grad)
        spoiled = weight.clone()
        spoiled[3, 2, 1, 1] = bad
        actual = run(Call(spoiled, scale), grad)
    rest = torch.arange(6) != 3
    for name in ("modulated", "weight"):
        assert torch.equal(actual[name][rest], clean[name][rest])
        assert actual[name][3, 2, 1, 1].isnan()
    assert not actual["scale"][2].isfinite()


def stylegan3(weight, style):
    """Returns the filters of StyleGAN3's modulated_conv2d with demodulation, for one sample."""
    # The pre-normalisation of both inputs cancels.
    w = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
    s = style * style.square().mean().rsqrt()
    w = w * s[None, :, None, None]
    return w * (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_stylegan3s_grouped_convolution(backend):
    # StyleGAN3 turns the batch into groups, each of which has its own copy of the filters.
    x, weight, scale = values((3, 6, 9, 10)), values((8, 6, 3, 3), seed=1), values(6, seed=2)
    filters = stylegan3(weight, scale).repeat(3, 1, 1, 1)
    expected = F.conv2d(x.reshape(1, 18, 9, 10), filters, padding=1, groups=3).reshape(3, 8, 9, 10)
    with use_backend(backend):
        actual = self_modulated_conv2d(x, weight, scale, padding=1)
        narrow = self_modulated_conv2d(x.float(), weight.float(), scale.float(), padding=1)
    # Filters have norm 1. StyleGAN3 adds eps = 1e-8 to a squared norm of 54, this package to the norm.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    # There are 54 products and their sums; the filters have lost OPERATIONS and a chain.
    assert_within_budget(
        narrow,
        expected,
        magnitude=F.conv2d(x.abs(), stylegan3(weight, scale).abs(), padding=1) + 1.0,
        operations=2 * 54 + OPERATIONS + NATIVE_CHAIN,
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("silu_input", [False, True])
def test_convolution_equals_torch_in_float64(backend, options, silu_input):
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
        call = Call(*(t.detach() for t in leaves[1:4]))
        allowed = budgets(call, through[1], backend)
        # silu'(x) is below 1 + |x|, and so is its error.
        magnitudes = [magnitude.detach(), through[0] * (1 + x.double().abs())]
        magnitudes += [allowed[name][0] for name in NAMES] + [through[2]]
        # No sum of the convolution and its gradients is longer than 2 * 12 * 11 products. A SiLU loses 20.
        operations = 2 * 2 * 12 * 11 + 20 + max(n for _, n in allowed.values())
        for actual, value, size in zip(
            (y, *gradients), (expected, *exact_gradients), magnitudes, strict=True
        ):
            if actual.dtype == torch.float64:
                actual = actual.to(dtype)  # judged by the dtype of the arithmetic
            assert_within_budget(actual.detach(), value.detach(), magnitude=size, operations=operations)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_convolution_of_any_dtype(backend, dtype):
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
def test_bad_residual(residual, error):
    x, weight = values((2, 4, 6, 5), torch.float32), values((3, 4, 1, 1), torch.float32)
    with pytest.raises(error, match="residual has"):
        self_modulated_conv2d(x, weight, torch.ones(4), residual=residual)


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_two_inputs(create_graph):
    weight, both = values((5, 1, 3, 3)), values(1, seed=1).requires_grad_()
    grad = values((5, 1, 3, 3), seed=2)
    (actual,) = torch.autograd.grad(
        modulate_weight(weight, both, both), both, grad, create_graph=create_graph
    )
    (expected,) = torch.autograd.grad(equation_3(weight, both, both, 1e-8), both, grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_is_rounded_once_from_wider_parameters(backend):
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast(backend, dtype):
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_is_not_rounded_through_bfloat16(backend, layout):
    weight, grad = (arrange(values((9, 20, 3, 3), torch.float16, seed=i), layout) for i in range(2))
    actual = check(Call(weight, values(20, torch.float16, seed=2)), grad, backend)
    for value in actual.values():
        # The last three of the 11 bits of float16 are zero in one of eight values.
        assert (value.bfloat16() != value).double().mean() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", range(1, 8))
def test_only_some_inputs_want_gradients(backend, given):
    call = Call(*(values(s, torch.float32, seed=i) for i, s in enumerate([(4, 3, 2, 3), (6,), (1,)])))
    grad = values((4, 3, 2, 3), torch.float32, seed=9)
    wanted = [name for bit, name in enumerate(NAMES) if given >> bit & 1]
    leaves = [t.detach().requires_grad_(n in wanted) for n, t in call.inputs().items()]
    with use_backend(backend), poisoned_memory():
        modulate_weight(*leaves).backward(grad)
    expected, allowed = exact(call, grad), budgets(call, grad, backend)
    for name, leaf in zip(NAMES, leaves, strict=True):
        if name in wanted:
            magnitude, operations = allowed[name]
            assert_within_budget(leaf.grad, expected[name], magnitude=magnitude, operations=operations)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    storage = values(4000, torch.float32)
    offset = storage[37 : 37 + 4 * 5 * 3 * 2].view(4, 5, 3, 2)
    negated = torch.complex(storage, storage).conj().imag[3:123].view(4, 5, 3, 2)
    assert negated.is_neg()
    stepped = storage[: 4 * 5 * 6 * 6].view(4, 5, 6, 6)[:, :, ::2, ::3]
    views = [
        offset,
        storage.as_strided((4, 5, 3, 2), (11, 3, 2, 1), 5),
        negated,
        stepped,
        offset.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        offset.flip(0),
    ]
    scales = [storage[50:60:2], storage[7:8].expand(5), negated[0, :, 0, 0]]
    for i, weight in enumerate(views):
        check(Call(weight, scales[i % 3], storage[99:100]), views[i - 1], backend)


def some_calls(count):
    rng = random.Random(5)
    for i in range(count):
        yield random_call(rng, DTYPES[i % 4], LAYOUTS[i // 4 % 5], 4 * i)


def test_every_instruction_set(each_isa):
    for _ in each_isa:
        for call, grad in some_calls(40):
            check(call, grad, "native")


@pytest.mark.parametrize("taps", [(3, 3), (3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_every_order_and_dtype_to_every_other(each_isa, layout, taps):
    """The channels fill whole vectors and a part of one, on every instruction set."""
    weight, grad = (values((3, 70, *taps), seed=i) for i in range(2))
    scale, gain = values(70, torch.float32, seed=2), values(1, torch.float32, seed=3)
    for _ in each_isa:
        for dtype in DTYPES:
            for out_dtype in DTYPES:
                for order in ("contiguous", "channels_last"):
                    memory_format = memory_format_of(order == "channels_last")
                    call = Call(
                        arrange(weight.to(dtype), layout), scale, gain, 1e-8, out_dtype, memory_format
                    )
                    check(call, arrange(grad.to(out_dtype), order), "native")


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_thread_count_and_run_do_not_change_the_bits(restore_threads, layout):
    for shape, groups in [((128, 96, 3, 3), 1), ((90, 31, 5, 5), 2), ((3, 2, 3, 3), 3)]:
        scale, gain = values(groups * shape[1], torch.float32, seed=1), values(1, torch.float32, seed=2)
        call = Call(arrange(values(shape, torch.float32), layout), scale, gain)
        results = []
        for threads in (2, 1, 5, 2, 2):
            torch.set_num_threads(threads)
            with use_backend("native"), poisoned_memory():
                results.append(run(call, values(shape, torch.float32, seed=3)))
        for other in results[1:]:
            assert all(torch.equal(other[name], results[0][name]) for name in other)


W, S, IMAGE = torch.ones(4, 6, 3, 3), torch.ones(6), torch.ones(2, 6, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: modulate_weight("w", S), TypeError, "weight is a str; a torch.Tensor is needed"),
        (lambda: modulate_weight(W.int(), S), TypeError, "weight has dtype torch.int32; allowed: float32"),
        (
            lambda: modulate_weight(W.to_sparse(), S),
            TypeError,
            "weight is torch.sparse_coo; a dense (strided)",
        ),
        (lambda: modulate_weight(W, [1.0]), TypeError, "scale is a list; a torch.Tensor is needed"),
        (lambda: modulate_weight(W, S.long()), TypeError, "scale has dtype torch.int64; allowed: float32"),
        (lambda: modulate_weight(W, S, 1.0), TypeError, "gain is a float; a torch.Tensor is needed"),
        (
            lambda: modulate_weight(W, S, torch.tensor([True])),
            TypeError,
            "gain has dtype torch.bool; allowed",
        ),
        (
            lambda: modulate_weight(W[0], S),
            ValueError,
            "weight has shape (6, 3, 3); 4 dimensions of at least 1",
        ),
        (lambda: modulate_weight(W[:0], S), ValueError, "weight has shape (0, 6, 3, 3); 4 dimensions"),
        (lambda: modulate_weight(W[:, :0], S), ValueError, "weight has shape (4, 0, 3, 3); 4 dimensions"),
        (
            lambda: modulate_weight(W, S[:5]),
            ValueError,
            "scale has shape (5,); (6,) is needed for a weight of (4, 6, 3, 3), or a multiple of it whose factor, "
            "the groups, divides 4",
        ),
        (lambda: modulate_weight(W, S.repeat(3)), ValueError, "scale has shape (18,); (6,) is needed"),
        (lambda: modulate_weight(W, S[:0]), ValueError, "scale has shape (0,); (6,) is needed"),
        (lambda: modulate_weight(W, S[None]), ValueError, "scale has shape (1, 6); (6,) is needed"),
        (lambda: modulate_weight(W, S, torch.ones(())), ValueError, "gain has shape (); (1,) is needed"),
        (lambda: modulate_weight(W, S, S), ValueError, "gain has shape (6,); (1,) is needed"),
        (lambda: modulate_weight(W, S, eps=0.0), ValueError, "eps is 0.0; a positive number is needed"),
        (lambda: modulate_weight(W, S, eps=float("nan")), ValueError, "eps is nan; a positive number"),
        (
            lambda: modulate_weight(W, S.to("meta")),
            ValueError,
            "scale is on meta; allowed: the weight's device, cpu",
        ),
        (
            lambda: modulate_weight(W, S, torch.ones(1, device="meta")),
            ValueError,
            "gain is on meta; allowed: the weight's device, cpu",
        ),
        (lambda: modulate_weight(W, S, dtype=torch.int8), TypeError, "dtype is torch.int8; allowed: float32"),
        (
            lambda: modulate_weight(W, S, memory_format=torch.channels_last_3d),
            ValueError,
            "memory_format is torch.channels_last_3d; allowed: torch.contiguous_format, torch.channels_last",
        ),
        (lambda: self_modulated_conv2d(None, W, S), TypeError, "x is a NoneType; a torch.Tensor is needed"),
        (lambda: self_modulated_conv2d(IMAGE.long(), W, S), TypeError, "x has dtype torch.int64; allowed"),
        (lambda: self_modulated_conv2d(IMAGE, W, None), TypeError, "scale is a NoneType; a torch.Tensor"),
        (lambda: self_modulated_conv2d(IMAGE, None, S), TypeError, "weight is a NoneType; a torch.Tensor"),
        (
            lambda: self_modulated_conv2d(IMAGE, W[0], S),
            ValueError,
            "weight has shape (6, 3, 3); 4 dimensions",
        ),
        (lambda: self_modulated_conv2d(IMAGE[0], W, S), ValueError, "x has 3 dimensions; 4 are needed"),
        (
            lambda: self_modulated_conv2d(IMAGE[:, :5], W, S),
            ValueError,
            "scale has shape (6,); x's channels are needed: (5,)",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S[:5]),
            ValueError,
            "scale has shape (5,); x's channels are",
        ),
        (
            lambda: self_modulated_conv2d(IMAGE, W, S, groups=2),
            ValueError,
            "groups is 2; with a weight of (4, 6, 3, 3) it does not give x's 6 channels",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, groups=0), ValueError, "groups is 0; with a weight of"),
        (lambda: self_modulated_conv2d(IMAGE, W, S, eps=-1.0), ValueError, "eps is -1.0; a positive number"),
        (
            lambda: self_modulated_conv2d(IMAGE, torch.ones(4, 2, 3, 3), S, groups=3),
            ValueError,
            "scale has shape (6,); (2,) is needed for a weight of (4, 2, 3, 3)",
        ),
        (lambda: self_modulated_conv2d(IMAGE, W, S, stride=0), RuntimeError, "stride"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
