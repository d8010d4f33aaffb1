"""Tests derivatives, registration and compilation of modulate_weight and self_modulated_conv2d."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from litevae_kernels import modulate_weight, self_modulated_conv2d, use_backend
from litevae_kernels.smc import op
from litevae_kernels.testing import LAYOUTS, arrange

BACKENDS = ("reference", "native")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def values(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(with_gain, groups=1, dtype=torch.float64):
    """Returns weight (4, 3, 2, 3), scale (3 groups) and gain (1)."""
    gain = values(1, dtype, seed=2) if with_gain else None
    return values((4, 3, 2, 3), dtype), values(3 * groups, dtype, seed=1), gain


# The gradients of all inputs are tested together, and each one alone.
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_gain", [False, True])
def test_gradcheck_twice(backend, groups, with_gain):
    tensors = inputs(with_gain, groups)
    present = [i for i, t in enumerate(tensors) if t is not None]
    for wanted in [present, *([i] for i in present)]:
        leaves = [t if t is None else t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]

        def function(*some, leaves=leaves, wanted=wanted):
            joined = list(leaves)
            for i, t in zip(wanted, some, strict=True):
                joined[i] = t
            return modulate_weight(*joined, eps=1e-2)

        some = tuple(leaves[i] for i in wanted)
        with use_backend(backend):
            assert torch.autograd.gradcheck(function, some)
            assert torch.autograd.gradgradcheck(function, some, fast_mode=True)


@pytest.mark.parametrize("silu_input", [False, True])
def test_gradcheck_of_the_convolution(backend, silu_input):
    x, bias = values((2, 3, 4, 5), seed=3), values(4, seed=4)
    leaves = [t.requires_grad_() for t in (x, *inputs(True), bias)]

    def function(*leaves):
        return self_modulated_conv2d(*leaves, padding=1, stride=2, silu_input=silu_input)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_second_derivatives_equal_torch():
    tensors, grad = inputs(True, 2), arrange(values((4, 3, 2, 3), seed=5), "transposed")

    def equation_3(weight, scale, gain):
        v = weight * scale.view(2, 1, 3).expand(2, 2, 3).reshape(4, 3, 1, 1)
        return gain * v / (v.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-8)

    def penalty(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
        return torch.autograd.grad(sum((g * g.cos()).sum() for g in first), leaves)

    expected = penalty(equation_3)
    for backend in BACKENDS:
        with use_backend(backend):
            actual = penalty(modulate_weight)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, with_gain, channels_last):
    weight, scale, gain = inputs(with_gain, 2, torch.float32)
    tensors = (arrange(weight, layout), scale, gain)
    arguments = (*tensors, 1e-8, torch.bfloat16, channels_last, "native")
    torch.library.opcheck(torch.ops.litevae.modulate_weight, arguments, test_utils=OPCHECKS)
    modulated, norm = op._forward(*arguments)
    grad = arrange(values(modulated.shape, torch.bfloat16, seed=4), layout)
    arguments = (grad, *tensors, norm, 1e-8, "native")
    torch.library.opcheck(torch.ops.litevae.modulate_weight_backward, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (4, 1, 3, 3), (4, 3, 1, 1), (1, 3, 3, 1)])
def test_fake_strides_are_the_real_ones(shape, layout, channels_last):
    weight = arrange(values(shape, torch.float16), layout)
    scale = values(2 * shape[1], torch.float32)[::2]
    rest = (1e-8, torch.bfloat16, channels_last, "native")
    real = [*op._forward(weight, scale, None, *rest)]
    real += op._backward(real[0], weight, scale, None, real[1], 1e-8, "native")
    with FakeTensorMode() as mode:
        fake_weight, fake_scale, grad, norm = (mode.from_tensor(t) for t in (weight, scale, *real[:2]))
        fake = [*torch.ops.litevae.modulate_weight(fake_weight, fake_scale, None, *rest)]
        backward = torch.ops.litevae.modulate_weight_backward
        fake += backward(grad, fake_weight, fake_scale, None, norm, 1e-8, "native")
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


def loss(x, weight, scale, gain, bias):
    y = self_modulated_conv2d(x.sin(), weight, scale, gain, bias, padding="same", silu_input=True)
    return y.square().mean() + modulate_weight(weight, scale, dtype=torch.float64).cos().mean()


def leaves_of(batch, height=9, width=11, layout="channels_last"):
    x = arrange(values((batch, 6, height, width), torch.float32), layout)
    shapes = [(4, 6, 3, 3), (6,), (1,), (4,)]
    parameters = [values(shape, torch.float32, seed=i + 1) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in (x, *parameters)]


@pytest.mark.parametrize(
    ("backend", "compiler"), [("native", "inductor"), ("native", "aot_eager"), ("reference", "aot_eager")]
)
def test_compiles_forward_and_backward(backend, compiler):
    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        # A second shape is compiled again, which takes a long time with Inductor.
        cases = [leaves_of(2), leaves_of(2, 7, 10, "contiguous")]
        for leaves in cases[: 1 if compiler == "inductor" else 2]:
            expected, actual = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(actual, expected)
            gradients = [torch.autograd.grad(value, leaves) for value in (actual, expected)]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_new_graph_for_another_batch_size(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for batch in (2, 3, 5, 8, 13):
        leaves = leaves_of(batch)
        value = compiled(*leaves)
        torch.testing.assert_close(value, loss(*leaves))
        value.backward()
        counts.append(counter.frame_count)
    # The second graph is the one with dynamic sizes. One more count may be a restart of the tracing for the float eps.
    assert counts[0 if dynamic else 1] == counts[-1]


def test_compiles_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(self_modulated_conv2d, fullgraph=True, backend="aot_eager")
    leaves = leaves_of(2)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(*leaves), self_modulated_conv2d(*leaves)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(y.float().sum(), leaves) for y in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("higher", [False, True])
def test_the_backward_keeps_the_backend_of_the_forward(monkeypatch, higher):
    calls = []
    original = op._backend
    monkeypatch.setattr(op, "_backend", lambda name: calls.append(name) or original(name))
    weight, scale, _ = inputs(False)
    weight.requires_grad_()
    with use_backend("native"):
        modulated = modulate_weight(weight, scale)
    with use_backend("reference"):
        torch.autograd.grad(modulated.sum(), weight, create_graph=higher)
    # A gradient that will be differentiated is computed by plain PyTorch.
    assert calls == ["native"] + ["native"] * (not higher)


def test_an_input_changed_before_backward_is_an_error():
    weight, scale, _ = inputs(False)
    w = weight.requires_grad_() * 1
    modulated = modulate_weight(w, scale)
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        modulated.sum().backward()


def test_a_training_step_lowers_the_loss():
    leaves = leaves_of(4)
    target = F.conv2d(leaves[0].detach(), values((4, 6, 3, 3), torch.float32, seed=9) / 7, padding=1)
    optimiser = torch.optim.Adam(leaves[1:], lr=0.05)
    losses = []
    for _ in range(20):
        value = F.mse_loss(self_modulated_conv2d(*leaves, padding=1), target)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 2
