"""The statistics that the Triton kernels measure for the next norm, under the interpreter and on a GPU."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.testing import LAYOUTS, arrange, assert_within_budget

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("litevae_kernels.group_norm_silu.triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_gpu)]
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1, 1), (1, 8, 13, 11), (1, 24, 3, 5), (1, 3, 17, 2), (2, 2, 43, 19))  # N, C, H, W


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_under_the_interpreter(under_the_interpreter: Any) -> None:
    under_the_interpreter(__file__, old_numpy=True)


def measured(x: Tensor) -> Tensor:
    """Returns the mean and the variance of each channel, (N, C, 2), from PyTorch in float64."""
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    return torch.stack([mean, variance], 2)


@on_device
@pytest.mark.parametrize("mean", [0.0, 1e5])
@pytest.mark.parametrize(
    "dtype", DTYPES if not INTERPRETED else (torch.float32, torch.float16, torch.float64)
)
def test_statistics_of_a_sum(device: str, dtype: torch.dtype, mean: float, monkeypatch: Any) -> None:
    """One or two residuals and up to two biases, whose sum is measured as it is stored, with the same bits again."""
    mean = mean if dtype == torch.float32 else min(mean, 3)
    for i, (n, c, h, w) in enumerate(SHAPES):
        with monkeypatch.context() as patch:
            # several tiles per chunk, and several chunks
            patch.setattr(kernels, "TILE", 256)
            patch.setattr(kernels, "SUMMED_STEPS", (4, 1)[i // 2 % 2])
            torch.manual_seed(i)
            layouts = (LAYOUTS[i % 3], LAYOUTS[i % 5], LAYOUTS[(i + 1) % 5])
            y, *residuals = (
                arrange((torch.randn(n, c, h, w, dtype=torch.float64) + mean).to(dtype).to(device), layout)
                for layout in layouts
            )
            residuals = residuals[: 1 + i % 2]
            options = [
                torch.randn(2 * c, device=device)[::2],
                torch.randn(c, dtype=torch.float64, device=device),
            ]
            biases = options[: i % 3]
            terms = [
                y.double(),
                *(t.double() for t in residuals),
                *(t.double()[:, None, None] for t in biases),
            ]
            exact, magnitude = sum(terms), sum(t.abs() for t in terms)
            again, statistics = (
                y.clone(),
                torch.full((2, n, c, 2), float("nan"), dtype=torch.float64, device=device),
            )
            kernels.add(y, residuals, biases, statistics[0])
            kernels.add(again, residuals, biases, statistics[1])
            assert_within_budget(y, exact, magnitude=magnitude, operations=len(terms))
            assert torch.equal(y, again)
            assert torch.equal(*statistics)
            check_statistics(statistics[0], y)


def check_statistics(statistics: Tensor, x: Tensor) -> None:
    """Compares statistics with PyTorch's, within the bounds of `check` for a shift that is a value of the channel."""
    want = measured(x)
    largest = (x.double() - want[..., 0][..., None, None]).abs().amax((2, 3))
    s, p = kernels.MAX_STEPS, min(triton.next_power_of_2(x.shape[2] * x.shape[3]), kernels.TILE)
    for i, magnitude in enumerate((2 * largest, 4 * largest.square())):
        error = (statistics - want)[..., i]
        error = error if x.dtype == torch.float64 else error.float()
        assert_within_budget(
            error, torch.zeros_like(error), magnitude=magnitude.double(), operations=2 * (s + p + 4)
        )


@on_device
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_given_statistics(device: str, mean: float) -> None:
    """They take the place of the first pass, also for groups with channels of both inputs."""
    torch.manual_seed(3)
    for c, c_skip, groups in ((12, 8, 4), (24, 0, 3), (3, 37, 2), (700, 0, 1)):
        x, skip = (
            (torch.randn(2, channels, 5, 7, dtype=torch.float64) + mean).float().to(device)
            for channels in (c, c_skip)
        )
        inputs = [x, skip] if c_skip else [x]
        joined = torch.cat(inputs, 1)
        weight, bias, offset = (torch.randn(c + c_skip, device=device) for _ in range(3))
        y, stats = (
            torch.full_like(joined, float("nan")),
            torch.empty(2, groups, 2, dtype=torch.float64, device=device),
        )
        given = [measured(t) for t in inputs]
        kernels.forward(x, skip if c_skip else None, weight, bias, y, stats, groups, 1e-6, offset, given)
        whole = (joined.double() - mean) + offset.double()[:, None, None]
        want = F.silu(F.group_norm(whole, groups, weight.double(), bias.double(), 1e-6))
        magnitude = 1.1 * (5 * weight.abs() + bias.abs()).double()[:, None, None]
        # z has six roundings and SiLU eight.
        assert_within_budget(y, want, magnitude=magnitude, operations=14)
