"""What the operators' tests share: error budgets, poisoned memory, and inputs of every shape and stride."""

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def assert_within_budget(
    actual: Tensor, exact: Tensor, *, magnitude: float | Tensor, operations: int
) -> None:
    """Compare a result with its float64 value, allowing what its arithmetic may lose and no more.

    Args:
        actual: the result, any floating-point dtype. Its arithmetic ran in float32 (float64 for float64).
        exact: the same in float64, from the same (already rounded) inputs.
        magnitude: bound on the absolute values that are added up: one number, or one for each element.
        operations: length of the longest chain of roundings; each loses half a unit in the last place of at
            most `magnitude`. Storing the result loses one more, relative to the result itself.

    Raises:
        AssertionError: with the largest error and its budget.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    exact = exact.to(torch.float64)
    computed = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    stored = torch.finfo(actual.dtype)
    # float64 results are compared with an oracle that rounds as well
    chains = 2 if actual.dtype == torch.float64 else 1
    budget = chains * operations * computed.eps / 2 * magnitude
    budget_each = budget + exact.abs() * stored.eps / 2 + stored.smallest_normal * stored.eps
    error = (actual.to(torch.float64) - exact).abs()
    worst = (error / budget_each).nan_to_num(nan=float("inf"))
    if worst.numel() and worst.max() > 1:
        at = int(worst.argmax())
        raise AssertionError(
            f"error {error.flatten()[at].item():.3g} over the budget {budget_each.flatten()[at].item():.3g} at flat "
            f"index {at} of {tuple(actual.shape)} {actual.dtype}: {actual.flatten()[at].item()!r}, exact "
            f"{exact.flatten()[at].item()!r}"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` inside the block is filled with NaN, so that an element never written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def arrange(x: Tensor, layout: str) -> Tensor:
    """The values of `x` (N, C, H, W) in another memory layout; "expanded" repeats the first image's values.

    Args:
        layout: one of `LAYOUTS`.
    """
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        big = torch.full((n, c + 2, h + 3, w + 5), float("nan"), dtype=x.dtype, device=x.device)
        view = big[:, 1 : 1 + c, 2 : 2 + h, 3 : 3 + w]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "expanded", layout
    return x[:1].expand(n, c, h, w)


def shapes(count: int, *, largest: int = 67, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """`count` random (N, C, H, W): heights and widths from 1 to `largest`, small and odd ones more often."""
    rng = random.Random(seed)

    def side() -> int:
        return rng.choice([rng.randint(1, 9), rng.randint(1, largest), 2 ** rng.randint(0, 6)])

    return [(rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 5]), side(), side()) for _ in range(count)]
