"""Sizes and extension modes of the Haar transform, for everything but the reference, which is judged apart."""

# The order is that of the core's enum (csrc/haar/haar.h).
MODES = ("symmetric", "reflect", "zero", "periodic", "constant")


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Returns (height, width) of the image and of each level's sub-bands, finest level first."""
    sizes = [(height, width)]
    for _ in range(levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def extension_index(n: int, mode: str) -> int:
    """Returns the index of the sample that extends an axis of odd length `n`, for every mode but "zero"."""
    return {"symmetric": n - 1, "constant": n - 1, "reflect": n - 2, "periodic": 0}[mode]
