import numpy as np
import pytest
import torch

from litevae_kernels.smc import reference


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equation_3(weight, scale, gain, eps):
    """Computes one filter at a time, in NumPy."""
    filters, inputs = weight.shape[:2]
    filters_per_group = filters // (len(scale) // inputs)
    out = np.empty(weight.shape)
    for o in range(filters):
        first = o // filters_per_group * inputs
        scaled = np.stack([scale[first + i] * weight[o, i] for i in range(inputs)])
        out[o] = gain * scaled / (np.sqrt((scaled**2).sum()) + eps)
    return torch.from_numpy(out)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("with_gain", [False, True])
def test_equals_equation_3(groups, with_gain):
    weight, scale = values(6, 5, 3, 2), values(5 * groups, seed=1)
    gain = values(1, seed=2) if with_gain else None
    expected = equation_3(weight.numpy(), scale.numpy(), 1.0 if gain is None else gain.item(), 0.1)
    actual = reference.modulate(weight, scale, gain, 0.1, torch.float64, True)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_derivatives():
    inputs = [t.requires_grad_() for t in (values(4, 3, 2, 2), values(3, seed=1), values(1, seed=2))]

    def modulate(*inputs):
        return reference.modulate(*inputs, 1e-2, torch.float64, False)

    assert torch.autograd.gradcheck(modulate, inputs)
    assert torch.autograd.gradgradcheck(modulate, inputs)


def test_the_gradient_of_a_zero_filter_is_finite():
    weight, scale = torch.zeros(2, 3, 3, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    modulated = reference.modulate(weight, scale, None, 1e-4, torch.float32, False)
    assert not modulated.any()
    grad_weight, grad_scale = torch.autograd.grad(modulated.sum(), (weight, scale))
    torch.testing.assert_close(grad_weight, torch.full_like(weight, 1e4))
    assert not grad_scale.any()


def test_half_precision_weights_whose_squares_underflow():
    weight = torch.full((1, 4, 3, 3), 1e-5).half()
    modulated = reference.modulate(weight, torch.ones(4).half(), None, 1e-12, torch.float16, False)
    torch.testing.assert_close(modulated, torch.full_like(weight, 1 / 6))
