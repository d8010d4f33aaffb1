"""group_norm_silu(..., statistics=): the mean and variance of each channel, which a GPU takes in place of a pass.

test_triton.py and tests/gpu_emulator check the kernels that use them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels import group_norm_silu, use_backend

X, SKIP = torch.randn(2, 6, 3, 5), torch.randn(2, 2, 3, 5)


def statistics_of(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    return torch.stack([mean, variance], 2)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_cpu_computes_its_own(backend: str, mode: type) -> None:
    with use_backend(backend), mode():
        wrong = [torch.full_like(statistics_of(x), float("nan")) for x in (X, SKIP)]
        y = group_norm_silu(X, 4, skip=SKIP, statistics=wrong)
        assert torch.equal(y, group_norm_silu(X, 4, skip=SKIP))


@torch.no_grad()
def test_compiles_to_one_graph() -> None:
    def call(x: Tensor, skip: Tensor) -> Tensor:
        return group_norm_silu(x, 4, skip=skip, statistics=[statistics_of(x), statistics_of(skip)])

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(X, SKIP), call(X, SKIP))


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        ([statistics_of(SKIP)], ValueError, "statistics has 1 tensors; 2 are needed, one per input"),
        ([statistics_of(SKIP)] * 2, ValueError, r"statistics has shape \(2, 2, 2\) .* \(2, 6, 2\) is needed"),
        (
            [statistics_of(X), statistics_of(torch.cat([SKIP, SKIP], 1))[:, ::2]],
            ValueError,
            r"strides \(8, 4, 1\); a contiguous",
        ),
        ([statistics_of(X).float(), statistics_of(SKIP)], TypeError, "statistics has dtype torch.float32"),
        (statistics_of(X), TypeError, "statistics is a Tensor; a list or tuple of tensors is needed"),
        (None, TypeError, "statistics is a NoneType; a list or tuple of tensors is needed"),
        ([statistics_of(X), 1.0], TypeError, "statistics is a float; a torch.Tensor is needed"),
        ([statistics_of(X), statistics_of(SKIP).to("meta")], ValueError, "statistics is on meta"),
    ],
)
def test_errors(statistics: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_norm_silu(X, 4, skip=SKIP, statistics=statistics)
