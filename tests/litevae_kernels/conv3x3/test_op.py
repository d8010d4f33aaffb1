"""Tests derivatives, registration and compilation of the 3x3 convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from litevae_kernels import conv3x3
from litevae_kernels.conv3x3 import dispatch
from litevae_kernels.nn import Conv3x3


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch):
    """Makes the kernels serve small images as well, so that the tests are fast."""
    monkeypatch.setattr(dispatch, "LEAST_PIXELS_BFLOAT16", 1)


def values(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fake_strides_are_the_real_ones(memory_format):
    x, grad = channels_last(values(2, 32, 6, 5)), values(2, 40, 6, 5, seed=1)
    weight = values(40, 32, 3, 3, dtype=torch.float32, seed=2).contiguous(memory_format=memory_format)
    operators = torch.ops.litevae
    calls = [
        (operators.conv3x3, (x, weight, None, None, False)),
        (operators.conv3x3_input_gradient, (grad, weight, True)),
        (operators.conv3x3_weight_gradient, (x, grad, weight)),
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.usefixtures("needs_kernel")
def test_gradients_of_no_images():
    x, weight = channels_last(values(0, 64, 5, 4)), values(48, 64, 3, 3)
    x.requires_grad_(), weight.requires_grad_()
    conv3x3(x, weight).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


@pytest.mark.usefixtures("needs_kernel")
def test_higher_derivatives_are_torchs():
    x = channels_last(values(1, 32, 5, 4)).requires_grad_()
    weight = values(32, 32, 3, 3, seed=1).requires_grad_()
    grad = values(1, 32, 5, 4, seed=2)

    def second(function):
        first = torch.autograd.grad(function(x, weight), (x, weight), grad, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), (x, weight))

    for actual, expected in zip(second(conv3x3), second(lambda x, w: F.conv2d(x, w, padding=1)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_a_tangent_is_an_error_and_not_lost(grad_enabled):
    x = channels_last(values(1, 32, 4, 4))
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            conv3x3(dual, values(32, 32, 3, 3))


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    x = channels_last(values(2, 32, 6, 5))
    added = values(2, 40, 6, 5, seed=2) if residual else None
    torch.library.opcheck(
        torch.ops.litevae.conv3x3.default, (x, values(40, 32, 3, 3, seed=1), values(40, seed=3), added, True)
    )


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_the_gradients(memory_format):
    x, grad = (channels_last(values(2, 32, 6, 5, seed=seed)) for seed in (0, 1))
    weight = values(32, 32, 3, 3, dtype=torch.float32).contiguous(memory_format=memory_format)
    torch.library.opcheck(torch.ops.litevae.conv3x3_input_gradient.default, (grad, weight, True))
    torch.library.opcheck(torch.ops.litevae.conv3x3_weight_gradient.default, (x, grad, weight))


@pytest.mark.usefixtures("needs_kernel")
@pytest.mark.parametrize("silu", [False, True])
def test_training_compiles_whole_and_once_for_all_batch_sizes(silu):
    counter = CompileCounterWithBackend("aot_eager")
    layer = Conv3x3(32, 48, silu_input=silu)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5):
        x = channels_last(values(batch, 32, 8, 6)).requires_grad_()
        residual = channels_last(values(batch, 48, 8, 6)).requires_grad_()
        results = []
        for function in (compiled, layer):
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x, residual)
            results.append(
                [y, *torch.autograd.grad(y.float().square().sum(), [x, residual, *layer.parameters()])]
            )
        # The gradient of the bias is 2y summed over all pixels, in another order in each of the two.
        y = results[1][0]
        errors = [0.0] * 4 + [y[:, 0].numel() * 2**-24 * 2 * float(y.float().abs().sum((0, 2, 3)).max())]
        for actual, expected, error in zip(*results, errors, strict=True):
            torch.testing.assert_close(actual, expected, atol=error, rtol=0 if not silu else 0.02)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("needs_kernel")
def test_compiles_whole_and_once_for_all_batch_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    layer = Conv3x3(32, 48, silu_input=True).bfloat16().eval()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = channels_last(values(batch, 32, 8, 6))
            residual = channels_last(values(batch, 48, 8, 6))
            assert torch.equal(compiled(x, residual), layer(x, residual))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_are_counted_whatever_serves_the_call(dtype):
    x = channels_last(values(2, 32, 9, 7, dtype=dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        conv3x3(x, values(64, 32, 3, 3, dtype=dtype))
    forward = 2 * 2 * 9 * 7 * 64 * 32 * 9
    assert counter.get_total_flops() == forward
    weight = values(64, 32, 3, 3, dtype=dtype).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        conv3x3(x.requires_grad_(), weight).sum().backward()
    assert counter.get_total_flops() == 3 * forward
