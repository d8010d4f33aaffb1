"""Derivatives, registration and compilation of group_norm_silu."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.group_norm_silu import op
from litevae_kernels.testing import LAYOUTS, arrange

BACKENDS = ("reference", "native")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(given, dtype=torch.float64, layout="contiguous"):
    """Returns x (2, 4, 3, 5), and skip (2, 2, 3, 5), weight and bias (6 or 4) if `given` says so, otherwise None."""
    with_skip, with_weight, with_bias = given
    channels = 6 if with_skip else 4
    return (
        arrange(values((2, 4, 3, 5), dtype), layout),
        arrange(values((2, 2, 3, 5), dtype, seed=1), layout) if with_skip else None,
        values(channels, dtype, seed=2) if with_weight else None,
        values(channels, dtype, seed=3) if with_bias else None,
    )


COMBINATIONS = list(itertools.product([False, True], repeat=3))


# This covers all combinations of the optional inputs, with the gradients of all inputs and of each one alone.
@pytest.mark.parametrize("given", COMBINATIONS)
def test_gradcheck_twice(backend, given):
    tensors = inputs(given)
    present = [i for i, t in enumerate(tensors) if t is not None]
    for wanted in [present, *([i] for i in present if len(present) > 1)]:
        leaves = [t if t is None else t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]

        def function(*some, leaves=leaves, wanted=wanted):
            joined = list(leaves)
            for i, t in zip(wanted, some, strict=True):
                joined[i] = t
            x, skip, weight, bias = joined
            return group_norm_silu(x, 2, weight, bias, eps=1e-2, skip=skip)

        with use_backend(backend):
            some = tuple(leaves[i] for i in wanted)
            assert torch.autograd.gradcheck(function, some, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, some, fast_mode=True)
    with use_backend(backend):  # once without the random projections
        assert torch.autograd.gradcheck(function, some)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_equal_torch(layout):
    x, skip, weight, bias = inputs((True, True, True), layout=layout)
    x = values((2, 4, 3, 5))[:, :, :, :].clone() if layout == "expanded" else x
    grad = arrange(values((2, 6, 3, 5), seed=5), layout)

    def penalty(function):
        leaves = [t.detach().requires_grad_() for t in (x, skip, weight, bias)]
        first = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
        return torch.autograd.grad(sum((g * g.cos()).sum() for g in first), leaves)

    def torchs(x, skip, weight, bias):
        return F.silu(F.group_norm(torch.cat([x, skip], 1), 3, weight, bias, 1e-6))

    expected = penalty(torchs)
    for backend in BACKENDS:
        with use_backend(backend):
            actual = penalty(lambda x, s, w, b: group_norm_silu(x, 3, w, b, skip=s))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", COMBINATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, given):
    tensors = inputs(given, torch.float32, layout)
    forward, backward = torch.ops.litevae.group_norm_silu, torch.ops.litevae.group_norm_silu_backward
    torch.library.opcheck(forward, (*tensors, 2, 1e-5, "native"), test_utils=OPCHECKS)
    y, stats = op._forward(*tensors, 2, 1e-5, "native")
    grad = arrange(values(y.shape, torch.float32, seed=4), layout)
    torch.library.opcheck(backward, (grad, *tensors, stats, 2, "native"), test_utils=OPCHECKS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 1, 3, 5), (2, 4, 1, 1), (2, 4, 3, 1), (0, 4, 3, 5)])
def test_fake_strides_are_the_real_ones(shape, layout):
    x = arrange(values(shape, torch.bfloat16), layout)
    skip = x.flip(1)
    real = [*op._forward(x, skip, None, None, 1, 1e-6, "native")]
    real += op._backward(real[0], x, skip, None, None, real[1], 1, "native")
    with FakeTensorMode() as mode:
        fake_x, fake_skip, grad, stats = (mode.from_tensor(t) for t in (x, skip, real[0], real[1]))
        fake = [*torch.ops.litevae.group_norm_silu(fake_x, fake_skip, None, None, 1, 1e-6, "native")]
        fake += torch.ops.litevae.group_norm_silu_backward(
            grad, fake_x, fake_skip, None, None, stats, 1, "native"
        )
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


def loss(x, skip, weight, bias):
    y = group_norm_silu(x.sin(), 2, weight, bias, skip=skip)
    z = group_norm_silu(y, 3, eps=1e-5)
    return (z * z.cos()).mean() + group_norm_silu(x, 4, bias=bias[: x.shape[1]]).mean()


def leaves_of(shape, layout="contiguous", dtype=torch.float32):
    n, c, h, w = shape
    return [
        arrange(values(shape, dtype), layout).requires_grad_(),
        arrange(values((n, c // 2, h, w), dtype, seed=1), layout).requires_grad_(),
        values(c + c // 2, torch.float32, seed=2).requires_grad_(),
        values(c + c // 2, torch.float32, seed=3).requires_grad_(),
    ]


@pytest.mark.parametrize(
    ("backend", "compiler"), [("native", "inductor"), ("native", "aot_eager"), ("reference", "aot_eager")]
)
def test_compiles_forward_and_backward(backend, compiler):
    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        # a second shape would be a second compilation, and Inductor takes long for each
        cases = [((2, 4, 7, 9), "channels_last"), ((2, 4, 8, 6), "contiguous")]
        for shape, layout in cases[: 1 if compiler == "inductor" else 2]:
            leaves = leaves_of(shape, layout)
            expected, actual = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(actual, expected)
            gradients = [torch.autograd.grad(value, leaves) for value in (actual, expected)]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b)
                assert a.stride() == b.stride() or backend == "reference"


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_new_graph_for_another_batch_size(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for batch in (2, 3, 5, 8, 13):
        # no two sizes are equal, because the compiler would treat them as one
        leaves = leaves_of((batch, 24, 17, 19), "channels_last")
        value = compiled(*leaves)
        torch.testing.assert_close(value, loss(*leaves))
        value.backward()
        counts.append(counter.frame_count)
    # PyTorch turns to dynamic sizes in the second graph, and may start tracing again once for the float eps
    assert counts[0 if dynamic else 1] == counts[-1]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (2, 4, 3, 2, 5)])
def test_compiles_for_other_numbers_of_dimensions(shape):
    torch._dynamo.reset()
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    x = values(shape, torch.float32).requires_grad_()
    actual, expected = compiled(x, 2), group_norm_silu(x, 2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.cos().sum(), x)[0] for y in (actual, expected)))


def test_compiles_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = leaves_of((2, 4, 5, 6), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(*leaves), loss(*leaves)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("higher", [False, True])
def test_the_backward_keeps_the_backend_of_the_forward(monkeypatch, higher):
    calls = []
    original = op.backend_module
    monkeypatch.setattr(op, "backend_module", lambda name: calls.append(name) or original(name))
    x = values((1, 2, 8, 8)).requires_grad_()
    with use_backend("native"):
        y = group_norm_silu(x, 1)
    with use_backend("reference"):
        torch.autograd.grad(y.sum(), x, create_graph=higher)
    # plain PyTorch computes a gradient that will be differentiated
    assert calls == ["native"] + ["native"] * (not higher)


def test_saved_statistics_hold_after_other_calls():
    # backward needs the statistics of its own call, not those of the latest one
    a, b = (values((1, 2, 4, 4), seed=i).requires_grad_() for i in range(2))
    y, z = group_norm_silu(a, 1), group_norm_silu(b * 100, 1)
    together = torch.autograd.grad(y.cos().sum() + z.cos().sum(), (a, b))
    alone = [
        torch.autograd.grad(f.cos().sum(), t)
        for f, t in [(group_norm_silu(a, 1), a), (group_norm_silu(b * 100, 1), b)]
    ]
    for g, (h,) in zip(together, alone, strict=True):
        assert torch.equal(g, h)


def test_an_input_changed_before_backward_is_an_error():
    x = values((1, 2, 4, 4)).requires_grad_()
    t = x * 1
    y = group_norm_silu(t, 1)
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_a_tangent_is_an_error_and_not_lost(grad_enabled):
    x = torch.randn(1, 4, 3, 3)
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with use_backend("native"), pytest.raises(NotImplementedError, match="jvp"):
            group_norm_silu(dual, 2)
        with use_backend("reference"):
            assert forward_ad.unpack_dual(group_norm_silu(dual, 2)).tangent is not None


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_two_inputs(create_graph):
    x, weight = (t.requires_grad_() for t in (values((2, 4, 3, 3)), values((8,), seed=1)))
    grad = values((2, 8, 3, 3), seed=2)
    y = group_norm_silu(x, 4, weight, weight, skip=x)
    normal = F.group_norm(torch.cat([x, x], 1), 4, weight, weight, 1e-6)
    actual = torch.autograd.grad(y, (x, weight), grad, create_graph=create_graph)
    torch.testing.assert_close(actual, torch.autograd.grad(F.silu(normal), (x, weight), grad))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_keep_the_memory_format(create_graph):
    x = values((2, 8, 5, 5)).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = group_norm_silu(x, 4)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
