import pytest
import torch
import torch.nn.functional as F

from litevae_kernels.conv3x3 import reference


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tap_by_tap(x, weight, bias, residual, silu_input):
    height, width = x.shape[2:]
    padded = F.pad(x * x.sigmoid() if silu_input else x, (1, 1, 1, 1))
    y = 0 if bias is None else bias[:, None, None]
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i : i + height, j : j + width]
            y = y + torch.einsum("nchw,oc->nohw", shifted, weight[:, :, i, j])
    return y if residual is None else y + residual


@pytest.mark.parametrize("silu_input", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_equals_the_sum_over_taps(optional, silu_input):
    x, weight = values(2, 3, 7, 4), values(5, 3, 3, 3, seed=1)
    bias, residual = (values(5, seed=2), values(2, 5, 7, 4, seed=3)) if optional else (None, None)
    arguments = (x, weight, bias, residual, silu_input)
    torch.testing.assert_close(reference.forward(*arguments), tap_by_tap(*arguments))


def test_gradients_equal_those_of_the_sum_over_taps():
    leaves = [t.requires_grad_() for t in (values(2, 3, 5, 4), values(5, 3, 3, 3, seed=1), values(5, seed=2))]
    residual, grad = values(2, 5, 5, 4, seed=3), values(2, 5, 5, 4, seed=4)
    results = [
        torch.autograd.grad(function(*leaves, residual, True), leaves, grad)
        for function in (reference.forward, tap_by_tap)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
