"""group_norm_silu(..., offset=): a number per channel that is added to the input, such as a convolution's bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.nn import GroupNormSiLU
from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# As in conftest.py: 20 for y and 128 + 4 for the statistics, and one more for the sum of input and offset.
OPERATIONS = 20 + 132 + 1


def exact(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, offset: Tensor) -> Tensor:
    wide = [None if t is None else t.double() for t in (weight, bias)]
    return F.silu(F.group_norm(x.double() + offset.double()[:, None, None], groups, *wide, eps=1e-6))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_equals_pytorch_in_float64(backend: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Groups of 5 have channels of both inputs, and the channels of a group have offsets of several deviations.
    x, skip = (arrange(torch.randn(2, c, 17, 19).to(dtype), layout) for c in (12, 8))
    weight, bias, offset = torch.randn(20), torch.randn(20).to(dtype), 3 * torch.randn(40)[::2]
    with use_backend(backend):
        y = group_norm_silu(x, 4, weight, bias, skip=skip, offset=offset)
        alone = group_norm_silu(x, 4, offset=offset[:12], overwrite=True)
    assert y.dtype == dtype
    magnitude = 5 * weight.abs().max().item() + bias.abs().max().item()
    for actual, args in (
        (y, (torch.cat([x, skip], 1), 4, weight, bias, offset)),
        (alone, (x, 4, None, None, offset[:12])),
    ):
        assert_within_budget(actual, exact(*args), magnitude=magnitude, operations=OPERATIONS)


@torch.no_grad()
def test_an_offset_far_from_the_input_costs_no_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 32, 32)
    offset = torch.full((8,), 12345.678)
    y = group_norm_silu(x, 4, offset=offset)
    assert_within_budget(y, exact(x, 4, None, None, offset), magnitude=5, operations=OPERATIONS)


def test_gradients_are_those_of_a_sum() -> None:
    torch.manual_seed(0)
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 6, 3, 5), (2, 2, 3, 5), 8, 8)
    ]

    def call(x: Tensor, skip: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return group_norm_silu(x, 4, weight, skip=skip, offset=offset)

    assert torch.autograd.gradcheck(call, leaves)


def test_compiles_to_one_graph() -> None:
    norm, x, offset = GroupNormSiLU(2, 6), torch.randn(2, 6, 5, 5), torch.randn(6)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(x, offset=offset), norm(x, offset=offset))


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"offset has shape \(3,\); \(8,\) is needed"),
        (torch.zeros(8, dtype=torch.int32), TypeError, "offset has dtype torch.int32"),
        (torch.zeros(8, device="meta"), ValueError, "offset is on meta; allowed: x's device, cpu"),
        (1.0, TypeError, "offset is a float; a torch.Tensor is needed"),
    ],
)
def test_errors(offset: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_norm_silu(torch.zeros(1, 8, 2, 2), 4, offset=offset)
