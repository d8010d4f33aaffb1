"""group_norm_silu and its gradients against torch.nn.functional in float64, on every backend that runs here."""

import random

import pytest
import torch

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget, poisoned_memory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# There are 400 cases per backend, and a quarter for each lower instruction set: 4 dtypes x 5 layouts of x x 20, with
# everything else at random.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_in_float64(check, random_call, backend, fewer, layout, dtype):
    rng = random.Random(f"{layout} {dtype}")
    for i in range(fewer(20)):
        seed = 1000 * LAYOUTS.index(layout) + 100 * DTYPES.index(dtype) + 5 * i
        call, grad = random_call(rng, dtype, layout, seed)
        actual = check(call, grad, backend)
        channels_last = layout == "channels_last" and call.x.shape[1] > 1
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert actual["y"].is_contiguous(memory_format=memory_format)
        if backend == "native":
            assert actual["x"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("skip_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_skip_and_gradient(make_call, values, check, backend, layout, skip_layout, grad_layout):
    # 6 + 10 channels in 4 groups: the second one straddles the border
    x, skip, grad = (values((2, c, 7, 9), torch.float32, seed=c) for c in (6, 10, 16))
    parameters = (values(16, torch.float32, seed=1), values(16, torch.float32, seed=2))
    call = make_call(arrange(x, layout), 4, *parameters, arrange(skip, skip_layout))
    actual = check(call, arrange(grad, grad_layout), backend)
    for name, source in [("y", layout), ("x", layout), ("skip", skip_layout)]:
        if backend == "native" or name == "y":
            channels_last = source == "channels_last"
            assert actual[name].is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_and_odd_shapes(make_call, values, check, backend, layout, dtype):
    for i, (shape, groups, border) in enumerate(DEGENERATE):
        joined, c = values(shape, dtype, seed=i), shape[1]
        call = make_call(
            arrange(joined[:, :border], layout),
            groups,
            values(c, torch.float32, seed=1),
            values(c, torch.float32, seed=2),
            arrange(joined[:, border:], layout) if border < c else None,
            1e-3,
        )
        check(call, arrange(values(shape, dtype, seed=3), layout), backend)


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


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 1, 1), (2, 4)])
def test_an_empty_skip(values, backend, shape):
    x = values(shape, torch.float32)
    with use_backend(backend), poisoned_memory():
        assert torch.equal(group_norm_silu(x, 2, skip=x[:, :0]), group_norm_silu(x, 2))
        assert torch.equal(group_norm_silu(x[:, :0], 2, skip=x), group_norm_silu(x, 2))


def test_one_dimension_keeps_its_memory_format(values):
    x = values((2, 50, 8), torch.float32).transpose(1, 2)
    assert group_norm_silu(x, 4).stride() == x.stride()


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 13), (2, 8, 3, 4, 5), (1, 8, 2, 3, 2, 5), (2, 8, 1, 1, 1)])
def test_other_numbers_of_dimensions(make_call, values, run, exact, budgets, backend, shape):
    formats = [torch.contiguous_format] + ([torch.channels_last_3d] if len(shape) == 5 else [])
    flat = (*shape[:2], -1, 1)
    for memory_format in formats:
        x, skip, grad = (values(shape, torch.float32, seed=i) for i in range(3))
        grad = torch.cat([grad, values(shape, torch.float32, seed=4)], 1).contiguous(
            memory_format=memory_format
        )
        x = x.contiguous(memory_format=memory_format)
        weight, bias = (values(16, torch.float32, seed=i) for i in (5, 6))
        call = make_call(x, 4, weight, bias, skip, 1e-3)
        with use_backend(backend), poisoned_memory():
            actual = run(call, grad)
        assert actual["y"].is_contiguous(memory_format=memory_format)
        flattened = make_call(x.reshape(flat), 4, weight, bias, skip.reshape(flat), 1e-3)
        flat_grad = grad.reshape(shape[0], 16, -1, 1)
        expected, allowed = exact(flattened, flat_grad), budgets(flattened, flat_grad, backend)
        for name, value in actual.items():
            if name in ("y", "x", "skip"):
                assert value.shape == (shape[0], 16 if name == "y" else 8, *shape[2:])
                value = value.reshape(expected[name].shape)
            magnitude, operations = allowed[name]
            assert_within_budget(value, expected[name], magnitude=magnitude, operations=operations)


def test_views(make_call, values, check, backend):
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
        check(make_call(x, 3), grad[:, :6], backend)
        check(make_call(x, 3, weight, weight.flip(0), views[i - 1]), grad, backend)


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
def test_large(make_call, values, check, backend, layout, shape, groups, border, dtype):
    joined = (values(shape) + 5).to(dtype)
    c = shape[1]
    call = make_call(
        arrange(joined[:, :border], layout),
        groups,
        values(c, torch.float32, seed=1),
        values(c, torch.float32, seed=2),
        arrange(joined[:, border:], layout) if border < c else None,
    )
    check(call, arrange(values(shape, dtype, seed=3), layout), backend)


@pytest.mark.parametrize("given", range(16))
def test_only_some_inputs_want_gradients(make_call, values, exact, budgets, backend, given):
    call = make_call(
        *(
            values(s, torch.float32, seed=i) if s else 3
            for i, s in enumerate([(2, 4, 5, 6), None, (6,), (6,), (2, 2, 5, 6)])
        )
    )
    grad = values((2, 6, 5, 6), torch.float32, seed=9)
    expected = exact(call, grad)
    wanted = [name for bit, name in enumerate(call.names()) if given >> bit & 1]
    leaves = {
        n: t.detach().requires_grad_(n in wanted) for n, t in zip(call.names(), call.inputs(), strict=True)
    }
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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_is_not_rounded_through_bfloat16(make_call, values, check, backend, layout):
    x, skip = (arrange(values((2, 8, 6, 7), torch.float16, seed=i), layout) for i in range(2))
    call = make_call(x, 2, values(16, torch.float16, seed=2), values(16, torch.float16, seed=3), skip)
    for value in check(call, arrange(values((2, 16, 6, 7), torch.float16, seed=4), layout), backend).values():
        # the last three of its 11 bits are zero in one of eight cases
        assert (value.bfloat16() != value).double().mean() > 0.5


def test_autocast_keeps_the_dtype(values, backend):
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
