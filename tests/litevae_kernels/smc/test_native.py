import pytest
import torch

from litevae_kernels.backend import core, cuda_built
from litevae_kernels.smc import native
from litevae_kernels.tensors import native_view


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nan(*shape, dtype=torch.float64):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_and_backward_fill_given_tensors(memory_format):
    weight, scale, gain, grad = (
        values(6, 20, 3, 3),
        values(40, seed=1),
        values(1, seed=2),
        values(6, 20, 3, 3, seed=3),
    )
    leaves = [t.requires_grad_() for t in (weight, scale, gain)]
    scaled = weight * scale.view(2, 1, 20).expand(2, 3, 20).reshape(6, 20, 1, 1)
    norms = scaled.square().sum((1, 2, 3)).sqrt()
    expected = gain * scaled / (norms + 0.1)[:, None, None, None]
    gradients = torch.autograd.grad(expected, leaves, grad)
    inputs = [t.detach() for t in leaves]
    modulated, norm = nan(6, 20, 3, 3).contiguous(memory_format=memory_format), nan(6)
    native.forward(*inputs, modulated, norm, 0.1)
    torch.testing.assert_close(modulated, expected.detach())
    torch.testing.assert_close(norm, norms.detach())
    outputs = [nan(6, 20, 3, 3).contiguous(memory_format=memory_format), nan(40), nan(1)]
    native.backward(grad, *inputs, norm, *outputs, 0.1)
    for actual, wanted in zip(outputs, gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modulated": nan(6, 4, 3, 2)}, "modulated does not fit the other tensors"),
        ({"scale": values(6)}, "scale does not fit the other tensors"),
        ({"scale": values(16)}, "scale does not fit the other tensors"),  # 4 groups of 6 filters
        ({"norm": nan(5)}, "norm does not fit the other tensors"),
        ({"norm": nan(6, dtype=torch.float32)}, "norm does not fit the other tensors"),
    ],
)
def test_the_core_refuses_tensors_that_do_not_fit(changes, message):
    tensors = {"weight": values(6, 4, 3, 3), "scale": values(4), "gain": None}
    tensors |= {"modulated": nan(6, 4, 3, 3), "norm": nan(6)}
    with pytest.raises(ValueError, match=message):
        native.forward(*(tensors | changes).values(), 1e-8)


# tests/gpu_emulator shows that the kernels use exactly this much.
@pytest.mark.skipif(not cuda_built, reason="the core was built without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scratch_memory_holds_each_filters_part_of_the_gradients(dtype):
    weight, norm = torch.empty(6, 4, 3, 3, device="meta"), torch.empty(6, dtype=dtype, device="meta")
    # one part per input channel's scale, and one of the gain
    assert (
        core.modulate_weight_scratch_bytes(native_view(weight), native_view(norm))
        == 6 * (4 + 1) * dtype.itemsize
    )
