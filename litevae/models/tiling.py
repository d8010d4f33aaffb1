"""Large images in overlapping tiles: their positions, and the blending of the results."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def apply_by_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    input_scale: int,
    output_scale: int,
) -> Tensor:
    """Returns `function(x)`, computed on overlapping tiles of `x` that are then blended.

    Args:
        function: maps (N, C, input_scale h, input_scale w) to (N, C', output_scale h, output_scale w).
        x: input of `function`, (N, C, H, W).
        tile: side of a tile, in latent pixels.
        overlap: least overlap of neighbouring tiles, in latent pixels.
        input_scale: pixels of `x` per latent pixel along a side.
        output_scale: pixels of the result per latent pixel along a side.
    """
    tops, lefts = (tile_starts(size // input_scale, tile, overlap) for size in x.shape[-2:])
    rows = []
    for top in tops:
        band = x[:, :, top * input_scale : (top + tile) * input_scale]
        row = [function(band[..., left * input_scale : (left + tile) * input_scale]) for left in lefts]
        rows.append(blend(row, [left * output_scale for left in lefts], dim=3))
    return blend(rows, [top * output_scale for top in tops], dim=2)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Returns the positions of the fewest equal tiles that cover `size` and overlap by at least `overlap`.

    The tiles are spread evenly, so that no tile is a sliver with little context.
    """
    if size <= tile:
        return [0]
    gaps = math.ceil((size - tile) / max(tile - overlap, 1))
    return [(size - tile) * i // gaps for i in range(gaps + 1)]


def blend(tiles: list[Tensor], starts: list[int], dim: int) -> Tensor:
    """Joins tiles that begin at `starts` along `dim`, with a crossfade where they overlap."""
    merged = tiles[0]
    for tile, start in zip(tiles[1:], starts[1:], strict=True):
        overlap = merged.shape[dim] - start
        ramp = torch.linspace(0, 1, overlap + 2, device=tile.device, dtype=tile.dtype)[1:-1]
        # The last few pixels of a tile are its worst; flat ends hide them better than a straight line does.
        ramp = ramp * ramp * (3 - 2 * ramp)
        ramp = ramp.view([-1 if d == dim else 1 for d in range(tile.ndim)])
        fade = torch.lerp(merged.narrow(dim, start, overlap), tile.narrow(dim, 0, overlap), ramp)
        rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
        merged = torch.cat([merged.narrow(dim, 0, start), fade, rest], dim=dim)
    return merged
