"""Negative controls on the real kernels: what the emulator must report, and the sectors that it counts."""

from typing import Any

import pytest
import torch
from kernel_cases.running import run_case

F32, BF16 = torch.float32, torch.bfloat16


def norm(kernels: Any) -> None:
    """Runs a forward pass whose kernels add up over a block."""
    x = torch.randn(1, 32, 16, 16).to(BF16).contiguous(memory_format=torch.channels_last)
    y, stats = torch.empty_like(x), torch.empty(1, 8, 2, dtype=torch.float64)
    kernels.run("group_norm_silu", "forward", x, None, None, None, y, stats, 8, 1e-6, written=[y, stats])


def test_dropped_barriers_are_races(cuda_kernels: Any) -> None:
    emulator = cuda_kernels.emulator
    emulator.reset()
    norm(cuda_kernels)
    assert emulator.problems() == []
    with emulator.without_barriers():
        norm(cuda_kernels)
    assert any(
        "shared memory: read of another thread's write without a barrier" in x for x in emulator.problems()
    )


def transform(kernels: Any, image: Any, dtype: Any = None, stacked: bool = True) -> None:
    """Runs Haar analysis of three levels; the coefficients have the layout of the image."""
    n, c, h, w = image.shape
    channels_last = image.stride(1) == 1
    coeffs = [
        torch.empty(n, 4 * c, -(-h // (2 << i)), -(-w // (2 << i)), dtype=dtype or image.dtype)
        for i in range(3)
    ]
    if channels_last:
        coeffs = [x.contiguous(memory_format=torch.channels_last) for x in coeffs]
    kernels.run("haar", "analysis", image, coeffs, 3, "symmetric", 0.5, stacked, written=coeffs)


@pytest.fixture
def short(cuda_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every tensor one row shorter than it says."""
    allow = cuda_kernels.emulator.allow
    monkeypatch.setattr(
        cuda_kernels, "allow", lambda x, writable: allow(x[..., :-1, :] if x.ndim == 4 else x, writable)
    )


@pytest.mark.usefixtures("short")
def test_a_short_buffer_is_out_of_bounds(cuda_kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="haar_analysis kernel failed: global memory: read out of bounds"):
        transform(cuda_kernels, torch.randn(1, 1, 16, 64))


def test_a_written_input_is_reported(cuda_kernels: Any) -> None:
    x = torch.randn(1, 8, 4, 4)
    y, stats = torch.empty_like(x), torch.empty(1, 8, 2, dtype=torch.float64)
    cuda_kernels.emulator.reset()
    cuda_kernels.run("group_norm_silu", "forward", x, None, None, None, y, stats, 8, 1e-6, written=[stats])
    assert any("write to an input" in line for line in cuda_kernels.emulator.problems())


@pytest.mark.parametrize(("dtype", "requests"), [(F32, 2), (BF16, 1)], ids=str)
def test_traffic_of_haar_analysis(cuda_kernels: Any, dtype: torch.dtype, requests: int) -> None:
    """Planar rows are read once, and each level's coefficients are written once, in whole sectors.

    A thread reads eight pixels of a row in vectors of 16 bytes, so `requests` of them touch each sector.
    """
    image = torch.randn(1, 3, 64, 256).to(dtype)
    (kernel,) = cuda_kernels.emulator.count_traffic(lambda: transform(cuda_kernels, image)).values()
    assert kernel.loads.widths == {16: image.nbytes}
    assert kernel.loads.bytes == image.nbytes == 32 * kernel.loads.distinct
    assert kernel.loads.excess == requests
    coefficients = image.nbytes * 21 // 16  # each level has as many coefficients as its LL has pixels
    assert kernel.stores.bytes == coefficients == 32 * kernel.stores.distinct
    assert kernel.stores.excess == 1


def test_problems_fail_a_case(cuda_kernels: Any) -> None:
    """The runner of the cases turns a report into a failure."""
    from kernel_cases.group_norm_silu import COVERING

    with cuda_kernels.emulator.without_barriers(), pytest.raises(AssertionError):
        run_case(cuda_kernels, "group_norm_silu", next(iter(COVERING["cuda"].values())))
