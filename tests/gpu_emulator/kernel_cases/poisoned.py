"""Tensors of any strides whose surroundings are NaN."""

import random
from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (
    "contiguous",
    "channels_last",
    "contiguous_sliced",
    "channels_last_sliced",
    "contiguous_pitched",
    "channels_last_pitched",
    "transposed",
    "misaligned",
    "wild",
)


class Poisoned:
    """A tensor in a buffer of NaN, which exposes accesses between its elements; beyond them the emulator does.

    Args:
        rng: source of the order and the gaps of "wild".
        shape: four sizes.
        dtype: a floating-point dtype.
        layout: one of `LAYOUTS`. Rows and planes of "sliced" have gaps that keep vectors aligned, images of "pitched"
            begin at any element, and "misaligned" begins one element past an aligned address.
    """

    def __init__(self, rng: random.Random, shape: Sequence[int], dtype: torch.dtype, layout: str) -> None:
        order = [3, 2, 1, 0]  # axes, innermost first
        if layout.startswith("channels_last"):
            order = [1, 3, 2, 0]
        elif layout == "transposed":
            order = [2, 3, 1, 0]
        elif layout == "wild":
            rng.shuffle(order)
        strides, extent = [0] * 4, 1
        for axis in order:
            if axis == 0 and layout.endswith("pitched"):
                extent += 1
            strides[axis] = extent
            extent *= shape[axis]
            if layout == "wild":
                extent += rng.randrange(3) * strides[axis]
            elif layout.endswith("sliced") and axis in order[:2]:
                extent += 8 * strides[axis]
        offset = 33 if layout in ("wild", "misaligned") else 32
        self.buffer = torch.full((extent + 64,), torch.nan, dtype=dtype)
        self.view = self.buffer.as_strided(list(shape), strides, offset)

    def check_surroundings(self, what: str) -> None:
        """Asserts that nothing was written outside the view, and overwrites it."""
        self.view.fill_(torch.nan)
        assert bool(self.buffer.isnan().all()), f"{what}: written outside the tensor"


def normal(rng: random.Random, shape: Sequence[int]) -> torch.Tensor:
    """Returns random numbers in float64."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
