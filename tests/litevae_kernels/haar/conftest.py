"""The shapes of a transform's coefficients."""

from collections.abc import Callable

import pytest

from litevae_kernels.haar.shapes import level_sizes


@pytest.fixture(scope="session")
def coeff_shapes() -> Callable[[int, int, int, int, int, bool], list[tuple[int, ...]]]:
    """Returns a function of an image's N, C, H and W, the levels and `stacked`."""

    def coeff_shapes(
        n: int, c: int, height: int, width: int, levels: int, stacked: bool
    ) -> list[tuple[int, ...]]:
        sizes = level_sizes(height, width, levels)[1:]
        if stacked:
            return [(n, 4 * c, *size) for size in sizes]
        return [(n, c, *sizes[-1])] + [(n, c, *size) for size in reversed(sizes) for _ in range(3)]

    return coeff_shapes
