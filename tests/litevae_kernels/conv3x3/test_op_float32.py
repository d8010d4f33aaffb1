"""Tests derivatives, registration and compilation of the float32 kernels of the 3x3 convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from litevae_kernels import conv3x3, use_backend
from litevae_kernels.arithmetic import current_isa, multiplies
from litevae_kernels.backend import core
from litevae_kernels.conv3x3.dispatch import serves
from litevae_kernels.nn import Conv3x3
from litevae_kernels.testing import arrange

FORMATS = [torch.contiguous_format, torch.channels_last]


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def test_the_kernels_serve_float32_on_every_cpu(isa):
    assert serves(torch.float32, isa, channels_innermost=False, channels=96, pixels=1024)
    assert not serves(torch.float64, isa, channels_innermost=True, channels=96, pixels=1024)
    for dtype in (torch.bfloat16, torch.float16):
        if not multiplies(dtype, isa):
            assert serves(dtype, isa, channels_innermost=False, channels=96, pixels=1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, dtype):
    x, residual, grad = (
        values(2, c, 9, 10, dtype=dtype, seed=c).contiguous(memory_format=memory_format) for c in (16, 24, 24)
    )
    weight = values(24, 16, 3, 3, dtype=dtype, seed=1)
    operators = torch.ops.litevae
    for added in (None, residual):
        torch.library.opcheck(operators.conv3x3.default, (x, weight, values(24, dtype=dtype), added, True))
    torch.library.opcheck(
        operators.conv3x3_input_gradient.default, (grad, weight, memory_format == torch.channels_last)
    )
    torch.library.opcheck(operators.conv3x3_weight_gradient.default, (x, grad, weight))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded"])
def test_fake_strides_are_the_real_ones(layout):
    x, grad = arrange(values(2, 16, 9, 10), layout), arrange(values(2, 24, 9, 10, seed=1), layout)
    weight = values(24, 16, 3, 3, seed=2)
    operators = torch.ops.litevae
    calls = [
        (operators.conv3x3, (x, weight, None, None, False)),
        (operators.conv3x3_input_gradient, (grad, weight, x.stride(1) == 1)),
        (operators.conv3x3_weight_gradient, (x, grad, weight)),
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_higher_derivatives_are_torchs():
    x = values(1, 16, 9, 10).requires_grad_()
    weight = values(16, 16, 3, 3, seed=1).requires_grad_()
    grad = values(1, 16, 9, 10, seed=2)

    def second(function):
        first = torch.autograd.grad(function(x, weight), (x, weight), grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    for actual, expected in zip(second(conv3x3), second(lambda x, w: F.conv2d(x, w, padding=1)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_training_compiles_whole_and_once_for_all_batch_sizes(precision, memory_format):
    dtype = torch.float32 if precision == "float32" else torch.float16
    if multiplies(dtype, current_isa()) and precision == "autocast":
        pytest.skip("PyTorch serves float16 on this CPU")
    counter = CompileCounterWithBackend("aot_eager")
    layer = Conv3x3(16, 24, bias=False)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5):
        x, residual = (
            values(batch, c, 9, 10).contiguous(memory_format=memory_format).requires_grad_() for c in (16, 24)
        )
        results = []
        for function in (compiled, layer):
            with torch.autocast("cpu", dtype, enabled=precision == "autocast"):
                y = function(x, residual)
            leaves = [x, residual, *layer.parameters()]
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
        for i in (
            0,
            1,
            3,
        ):  # The compiler chooses the layout in which it passes on the gradient of the result.
            assert results[0][i].stride() == results[1][i].stride()
    assert counter.frame_count == 1


@pytest.mark.skipif(core is None, reason="needs the core")
def test_a_forced_kernel_stays_in_an_exported_graph():
    layer, image = Conv3x3(4, 4), (torch.randn(1, 4, 16, 16),)
    with use_backend("native"):
        assert "litevae.conv3x3" in str(torch.export.export(layer, image, strict=False).graph)
    assert "litevae" not in str(torch.export.export(layer, image, strict=False).graph)


def test_autocast_in_the_backward_pass_changes_nothing():
    x, weight = torch.randn(1, 16, 4, 4, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)
    y, expected = conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    grad = torch.randn_like(expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight), grad))
