"""Compares modulate_weight with Equation 3 in float64, on every backend that runs here."""

import random

import pytest
import torch

from litevae_kernels import modulate_weight, use_backend
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# 320 cases per backend, and a quarter for each lower instruction set: 4 dtypes x 5 layouts of the weight x 16.
# Everything else is random.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_equation_3_in_float64(check, random_call, backend, fewer, layout, dtype):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(fewer(16)):
        seed = 1000 * LAYOUTS.index(layout) + 100 * DTYPES.index(dtype) + 4 * i
        call, grad = random_call(rng, dtype, layout, seed)
        actual = check(call, grad, backend)
        weight_last = layout == "channels_last" and call.weight.shape[1] > 1
        inherited = torch.channels_last if weight_last else torch.contiguous_format
        assert actual["modulated"].is_contiguous(memory_format=call.memory_format or inherited)
        if backend == "native":
            assert actual["weight"].is_contiguous(memory_format=inherited)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weight_and_gradient(make_call, values, check, backend, layout, grad_layout):
    weight, grad = (values((6, 5, 3, 4), torch.float32, seed=i) for i in range(2))
    for memory_format in (None, torch.contiguous_format, torch.channels_last):
        call = make_call(
            arrange(weight, layout),
            values(10, torch.float32, seed=2),
            values(1, torch.float32, seed=3),
            memory_format=memory_format,
        )
        check(call, arrange(grad, grad_layout), backend)


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
def test_large(make_call, values, check, backend, layout, shape, groups, dtype):
    scale, gain = values(groups * shape[1], torch.float32, seed=1), values(1, torch.float32, seed=2)
    call = make_call(arrange(values(shape, dtype), layout), scale, gain)
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 1, 1, 1), (1, 6, 1, 1), (1, 1, 3, 3), (2, 1, 1, 7)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_shapes(make_call, values, check, backend, shape, layout, dtype):
    call = make_call(arrange(values(shape, dtype), layout), values(shape[1], seed=1).to(dtype))
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_filters_and_scales(make_call, values, check, backend, dtype):
    weight, grad = values((4, 3, 3, 3), dtype), values((4, 3, 3, 3), dtype, seed=1)
    weight[2] = 0
    gain = torch.tensor([1.5])
    actual = check(make_call(weight, values(3, torch.float32, seed=2), gain), grad, backend)
    assert not actual["modulated"][2].any()
    assert actual["weight"].isfinite().all()
    actual = check(make_call(weight, torch.zeros(3), gain), grad, backend)
    assert not actual["modulated"].any()
    assert not actual["weight"].any()  # The slope is scale * gain / eps.
    assert actual["scale"].isfinite().all()
    actual = check(make_call(torch.zeros_like(weight), torch.ones(3)), grad, backend)
    assert not actual["modulated"].any()
    assert not actual["scale"].any()


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
def test_small_and_large_weights(make_call, values, check, backend, dtype, size):
    weight = (values((5, 4, 3, 3)).clamp(-1, 1) * size).to(dtype)
    grad = values(weight.shape, dtype, seed=1)
    gain = values(1, torch.float32, seed=3)
    call = make_call(weight, values(4, torch.float32, seed=2), gain)
    actual = check(call, grad, backend)
    if size > 1e-6:
        norms = actual["modulated"].double().square().sum((1, 2, 3)).sqrt()
        torch.testing.assert_close(norms, gain.double().abs().expand(5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_own_filter_only(make_call, values, run, backend, bad):
    weight, scale = values((6, 4, 3, 3), torch.float32), values(4, torch.float32, seed=1)
    grad = values(weight.shape, torch.float32, seed=2)
    with use_backend(backend):
        clean = run(make_call(weight, scale), grad)
        spoiled = weight.clone()
        spoiled[3, 2, 1, 1] = bad
        actual = run(make_call(spoiled, scale), grad)
    rest = torch.arange(6) != 3
    for name in ("modulated", "weight"):
        assert torch.equal(actual[name][rest], clean[name][rest])
        assert actual[name][3, 2, 1, 1].isnan()
    assert not actual["scale"][2].isfinite()


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_two_inputs(values, equation_3, create_graph):
    weight, both = values((5, 1, 3, 3)), values(1, seed=1).requires_grad_()
    grad = values((5, 1, 3, 3), seed=2)
    (actual,) = torch.autograd.grad(
        modulate_weight(weight, both, both), both, grad, create_graph=create_graph
    )
    (expected,) = torch.autograd.grad(equation_3(weight, both, both, 1e-8), both, grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_is_not_rounded_through_bfloat16(make_call, values, check, backend, layout):
    weight, grad = (arrange(values((9, 20, 3, 3), torch.float16, seed=i), layout) for i in range(2))
    actual = check(make_call(weight, values(20, torch.float16, seed=2)), grad, backend)
    for value in actual.values():
        # The last three of the 11 bits of float16 are zero in one of eight values.
        assert (value.bfloat16() != value).double().mean() > 0.5


@pytest.mark.parametrize("given", range(1, 8))
def test_only_some_inputs_want_gradients(make_call, values, exact, budgets, backend, given):
    call = make_call(*(values(s, torch.float32, seed=i) for i, s in enumerate([(4, 3, 2, 3), (6,), (1,)])))
    grad = values((4, 3, 2, 3), torch.float32, seed=9)
    wanted = [name for bit, name in enumerate(call.inputs()) if given >> bit & 1]
    leaves = [t.detach().requires_grad_(n in wanted) for n, t in call.inputs().items()]
    with use_backend(backend), poisoned_memory():
        modulate_weight(*leaves).backward(grad)
    expected, allowed = exact(call, grad), budgets(call, grad, backend)
    for name, leaf in zip(call.inputs(), leaves, strict=True):
        if name in wanted:
            magnitude, operations = allowed[name]
            assert_within_budget(leaf.grad, expected[name], magnitude=magnitude, operations=operations)
        else:
            assert leaf.grad is None


def test_views(make_call, values, check, backend):
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
        check(make_call(weight, scales[i % 3], storage[99:100]), views[i - 1], backend)
