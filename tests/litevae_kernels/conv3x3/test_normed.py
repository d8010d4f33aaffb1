"""The convolution that normalises and activates its input while it reads it, against float64 and the two operators."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from litevae_kernels import conv3x3, group_norm_silu, use_backend
from litevae_kernels.arithmetic import multiplies
from litevae_kernels.conv3x3 import native
from litevae_kernels.conv3x3.normed import norm_silu_conv3x3
from litevae_kernels.testing import LAYOUTS, arrange, poisoned_memory

# Channels of x and of skip, outputs, height and width. The last two have a divided vector, and a small image.
SHAPES = (
    (32, 0, 48, 13, 19),
    (32, 16, 20, 9, 33),
    (48, 0, 16, 40, 70),
    (16, 8, 16, 12, 1),
    (24, 8, 16, 12, 12),
    (16, 0, 16, 5, 5),
)
# Relative to float64, in norm: float32 has the error of F(4x4, 3x3), half precision one rounding.
BUDGETS = {torch.float32: 1.5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def problem(shape, dtype, layout, mean):
    channels, more, outputs, height, width = shape
    g = torch.Generator().manual_seed(0)
    x = arrange((torch.randn(2, channels, height, width, generator=g) + mean).to(dtype), layout)
    skip = (
        arrange((2 * torch.randn(2, more, height, width, generator=g) - mean).to(dtype), layout)
        if more
        else None
    )
    norm = [torch.randn(channels + more, generator=g), torch.randn(channels + more, generator=g)]
    weight = torch.randn(outputs, channels + more, 3, 3, generator=g).to(dtype)
    bias = torch.randn(outputs, generator=g).to(dtype)
    residual = arrange(torch.randn(2, outputs, height, width, generator=g).to(dtype), layout)
    return x, skip, norm, weight, bias, residual


def exact(x, skip, norm, weight, bias, residual):
    both = x.double() if skip is None else torch.cat([x, skip], 1).double()
    h = F.silu(F.group_norm(both, 8, norm[0].double(), norm[1].double(), 1e-6))
    return F.conv2d(h, weight.double(), bias.double(), padding=1) + residual.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@torch.no_grad()
def test_result_within_the_budget(dtype, layout, isa):
    for shape in SHAPES:
        for mean in (0, 1e3) if dtype == torch.float32 else (0,):
            x, skip, norm, weight, bias, residual = problem(shape, dtype, layout, mean)
            with poisoned_memory():
                y = norm_silu_conv3x3(x, 8, *norm, weight, bias, skip=skip, residual=residual)
            two = conv3x3(group_norm_silu(x, 8, *norm, skip=skip), weight, bias, residual=residual)
            assert y.dtype == dtype
            assert y.stride() == two.stride()
            expected = exact(x, skip, norm, weight, bias, residual)
            # Two operators also round the normalised tensor, and the kernels in bfloat16 both of their factors.
            budget = BUDGETS[dtype] * (1 if dtype == torch.float32 or not multiplies(dtype, isa) else 4)
            assert (y - expected).norm() <= budget * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_same_bits_as_the_two_operators(dtype, isa):
    """The kernels that multiply in bfloat16 round the normalised input, as the two operators do."""
    if dtype == torch.bfloat16 and not multiplies(dtype, isa):
        pytest.skip(f"the float32 kernels of {isa} do not round the normalised input")
    for shape, layout, mean in itertools.product(SHAPES, LAYOUTS, (0, 100)):
        x, skip, norm, weight, bias, residual = problem(shape, dtype, layout, mean)
        y = norm_silu_conv3x3(x, 8, *norm, weight, bias, skip=skip, residual=residual)
        h = group_norm_silu(x, 8, *norm, skip=skip)
        assert torch.equal(y, conv3x3(h, weight, bias, residual=residual))


def test_missing_parameters_empty_batches_gradients_and_the_reference():
    x, skip, norm, weight, bias, residual = problem(SHAPES[1], torch.float32, "contiguous", 0)
    with torch.no_grad():
        plain = norm_silu_conv3x3(x, 8, None, None, weight[:, :32])
        torch.testing.assert_close(plain, conv3x3(group_norm_silu(x, 8), weight[:, :32]))
        assert norm_silu_conv3x3(x[:0], 8, None, None, weight[:, :32]).shape == (0, 20, 9, 33)
        with use_backend("reference"):
            direct = F.conv2d(group_norm_silu(x, 8, *norm, skip=skip), weight, bias, padding=1) + residual
            assert torch.equal(
                norm_silu_conv3x3(x, 8, *norm, weight, bias, skip=skip, residual=residual), direct
            )
        compiled = torch.compile(norm_silu_conv3x3, backend="aot_eager", fullgraph=True)
        for t in (x, x[:1]):
            assert torch.equal(compiled(t, 8, None, None, weight[:, :32]), plain[: len(t)])
        with pytest.raises(ValueError, match=r"weight has shape .*\(C_out, 48, 3, 3\)"):
            norm_silu_conv3x3(x, 8, *norm, weight[:, :32], skip=skip)
        for wrong in (3, x.to_sparse()):
            with pytest.raises(TypeError, match="x is "):
                norm_silu_conv3x3(wrong, 8, *norm, weight)
            with pytest.raises(TypeError, match="weight is "):
                norm_silu_conv3x3(x, 8, None, None, wrong)
        with pytest.raises(ValueError, match="num_groups is 7"):
            norm_silu_conv3x3(x, 7, *norm, weight, skip=skip)
    leaf = x.clone().requires_grad_()
    norm_silu_conv3x3(leaf, 8, *norm, weight, bias, skip=skip, residual=residual).sum().backward()
    wide = x.double().requires_grad_()
    exact(wide, skip, norm, weight, bias, residual).sum().backward()
    assert (leaf.grad - wide.grad).norm() <= 1e-5 * wide.grad.norm()


def test_the_core_refuses_a_skip_that_begins_within_a_vector(isa):
    x, skip, y = torch.randn(1, 18, 8, 8), torch.randn(1, 14, 8, 8), torch.empty(1, 16, 8, 8)
    stats = torch.zeros(1, 8, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="whole vectors of channels"):
        native.norm_forward(x, skip, None, None, stats, torch.randn(16, 32, 3, 3), None, None, y)
    with pytest.raises(ValueError, match="weight"):
        native.norm_forward(x, skip, None, None, stats, torch.randn(16, 18, 3, 3), None, None, y)


def test_operator_is_registered_correctly():
    x, skip, norm, weight, bias, residual = problem(SHAPES[1], torch.float32, "channels_last", 0)
    torch.library.opcheck(
        torch.ops.litevae.norm_silu_conv3x3.default,
        (x, skip, 8, *norm, 1e-6, weight, bias, residual),
        test_utils=("test_schema", "test_faketensor"),
    )
