import pytest
import torch
import torch.nn.functional as F

from litevae_kernels.backend import core, cuda_built
from litevae_kernels.group_norm_silu import native
from litevae_kernels.tensors import native_view


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nan(*shape):
    return torch.full(shape, float("nan"), dtype=torch.float64)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sliced", [False, True])
def test_forward_and_backward_fill_given_tensors(memory_format, sliced):
    x, skip, grad = values(2, 8, 5, 3), values(2, 4, 5, 3, seed=1), values(2, 12, 5, 3, seed=2)
    weight, bias = values(12, seed=3), values(12, seed=4)
    leaves = [t.clone().requires_grad_() for t in (x, skip, weight, bias)]
    expected = F.silu(F.group_norm(torch.cat(leaves[:2], 1), 3, *leaves[2:], 1e-6))
    gradients = torch.autograd.grad(expected, leaves, grad)
    groups = torch.cat([x, skip], 1).view(2, 3, -1)
    if sliced:  # The core needs adjacent elements in the innermost dimension, so `native` copies this tensor.
        x = torch.stack([x, nan(*x.shape)], -1).flatten(-2)[..., ::2]
    y, stats = nan(2, 12, 5, 3).contiguous(memory_format=memory_format), nan(2, 3, 2)
    native.forward(x, skip, weight, bias, y, stats, 3, 1e-6)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(stats[..., 0], groups.mean(2))
    torch.testing.assert_close(stats[..., 1], (groups.var(2, correction=0) + 1e-6).rsqrt())
    outputs = [nan(*t.shape) for t in leaves]
    outputs[0], outputs[1] = (t.contiguous(memory_format=memory_format) for t in outputs[:2])
    native.backward(grad, x, skip, weight, bias, stats, *outputs, 3)
    for actual, wanted in zip(outputs, gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("y", "weight", "groups", "message"),
    [
        ((2, 8, 5, 4), 8, 4, "y does not fit the other tensors"),
        ((2, 8, 5, 3), 7, 4, "weight does not fit the other tensors"),
        ((2, 8, 5, 3), 8, 3, "groups do not divide the channels: 3"),
    ],
)
def test_the_core_refuses_tensors_that_do_not_fit(y, weight, groups, message):
    with pytest.raises(ValueError, match=message):
        native.forward(
            values(2, 8, 5, 3), None, values(weight), None, nan(*y), nan(2, groups, 2), groups, 1e-6
        )


# tests/gpu_emulator shows that the kernels stay inside this much.
@pytest.mark.skipif(not cuda_built, reason="the core was built without CUDA")
def test_scratch_memory_grows_with_the_pixels():
    def scratch_bytes(*shape, dtype=torch.float32):
        return core.group_norm_silu_scratch_bytes(native_view(torch.empty(shape, dtype=dtype, device="meta")))

    small, large = scratch_bytes(2, 8, 16, 16), scratch_bytes(2, 8, 512, 512)
    assert 0 < small < large
    assert scratch_bytes(4, 8, 16, 16) >= 2 * small
    # at least two pairs of doubles per image and channel, besides the partial sums
    assert scratch_bytes(1, 1, 1, 1, dtype=torch.bfloat16) >= 2 * 16
