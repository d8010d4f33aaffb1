"""group_norm_silu(..., overwrite=True): the same bits, in the memory of x where that is allowed and possible."""

import pytest
import torch
from torch.autograd import forward_ad

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.testing import LAYOUTS, arrange

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
@pytest.mark.usefixtures("isa")
def test_same_bits_under_every_instruction_set(dtype, layout):
    torch.manual_seed(0)
    weight, bias = torch.randn(12), torch.randn(12)
    for shape in ((2, 12, 37, 53), (3, 12, 1, 1), (1, 12, 128, 300), (0, 12, 4, 4)):
        x = arrange(torch.randn(shape).to(dtype), layout)
        expected, before = group_norm_silu(x, 4, weight, bias), x.clone()
        actual = group_norm_silu(x, 4, weight, bias, overwrite=True)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        dense = any(x.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
        assert torch.equal(actual if dense else before, x)


def test_the_permission_is_ignored_where_values_are_needed():
    def check(*args, **kwargs):
        before = args[0].detach().clone()
        y = group_norm_silu(*args, overwrite=True, **kwargs)
        assert torch.equal(args[0], before)
        return y

    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    check(x, 4).sum().backward()  # Gradients are recorded.
    assert x.grad is not None
    x = x.detach()
    with torch.no_grad():
        check(x, 4, skip=x)
        with use_backend("reference"):
            check(x, 4)
        torch.compile(lambda x: group_norm_silu(x, 4, overwrite=True), backend="eager", fullgraph=True)(x)
        before = x.clone()
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            group_norm_silu(forward_ad.make_dual(x, torch.ones_like(x)), 4, overwrite=True)
        assert torch.equal(x, before)


def test_operator_is_registered_correctly():
    x = torch.randn(2, 8, 5, 5)
    torch.library.opcheck(
        torch.ops.litevae.group_norm_silu_.default,
        (x, torch.ones(8), None, 4, 1e-6),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_backward_pass_that_needs_the_overwritten_values_fails():
    h = torch.randn(1, 8, 4, 4, requires_grad=True) * 1
    loss = (h * h).sum()
    with torch.no_grad():
        y = group_norm_silu(h, 4, overwrite=True)
    if y.data_ptr() == h.data_ptr():  # where a kernel has overwritten them
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
