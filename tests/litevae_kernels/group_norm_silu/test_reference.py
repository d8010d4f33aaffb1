import pytest
import torch
import torch.nn.functional as F

from litevae_kernels.group_norm_silu import reference


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_torch(x, skip, weight, bias, num_groups, eps):
    joined = x if skip is None else torch.cat([x, skip], 1)
    return F.silu(F.group_norm(joined, num_groups, weight, bias, eps))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("skip_channels", [0, 4])
def test_equals_torch_with_gradients(skip_channels, affine):
    channels = 8 + skip_channels
    x, skip = values(2, 8, 5, 3), values(2, skip_channels, 5, 3, seed=1) if skip_channels else None
    weight, bias = (values(channels, seed=2), values(channels, seed=3)) if affine else (None, None)
    inputs = [None if t is None else t.requires_grad_() for t in (x, skip, weight, bias)]
    present = [t for t in inputs if t is not None]
    grad = values(2, channels, 5, 3, seed=4)
    results = []
    for function in (reference.forward, by_torch):
        y = function(*inputs, 4, 1e-3)
        results.append([y, *torch.autograd.grad(y, present, grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_keeps_the_memory_format_and_rounds_once():
    x = values(2, 8, 5, 3).half().contiguous(memory_format=torch.channels_last)
    y = reference.forward(x, None, None, None, 2, 1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, reference.forward(x.float(), None, None, None, 2, 1e-6).half())


def test_one_value_per_group_and_no_value_at_all():
    one = reference.forward(values(2, 4, 1, 1), None, None, torch.arange(4.0), 4, 1e-6)
    torch.testing.assert_close(one[0, :, 0, 0], F.silu(torch.arange(4.0, dtype=torch.float64)))
    assert reference.forward(torch.empty(0, 4, 3, 3), None, None, None, 2, 1e-6).shape == (0, 4, 3, 3)


def test_a_large_mean_does_not_cost_digits():
    x = values(1, 4, 32, 32)
    shifted = reference.forward((x + 2.0**12).float(), None, None, None, 2, 1e-6)
    exact = reference.forward((x + 2.0**12).float().double(), None, None, None, 2, 1e-6)
    # The mean of 2048 values near 4096 is off by a few units in the last place of 4096 in float32.
    torch.testing.assert_close(
        shifted.double(), exact, rtol=0, atol=8 * 2.0**12 * torch.finfo(torch.float32).eps
    )
