"""Prints which norms of LiteVAE-B's encoder run in thread-block clusters; needs a core with CUDA, and no GPU.

``python -m benchmarks.gpu.clusters`` prints the table of docs/performance.md: the calls that csrc/group_norm_silu/
plan.cuh gives to clusters, how it divides them, and the bytes of all norms. None of them is a speed.
"""

import argparse
import sys
from types import ModuleType

from torch import Tensor

from benchmarks.gpu.traffic import SIZE, group_norm_silu, group_norm_silu_in_clusters, record
from benchmarks.report import markdown
from litevae_kernels.backend import core
from litevae_kernels.tensors import DTYPES

MODEL = "LiteVAE-B"
BATCHES = (1, 8, 32)
# Multiprocessors, bytes of shared memory per block, blocks per cluster: what the core asks a GPU.
CARDS = {
    "H200": (132, 232448, 16),
    "H200, 8 blocks per cluster": (132, 232448, 8),
    "RTX 5090": (170, 101376, 8),
}


def view(x: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Returns a tensor in channels_last as the core takes it, at an aligned address that is not accessed."""
    _, c, h, w = x.shape
    return 4096, DTYPES[x.dtype], tuple(x.shape), (c * h * w, 1, w * c, c)


def row(core: ModuleType, card: tuple[int, int, int], batch: int) -> list[str]:
    """Returns the cells of a batch."""
    norms = record(MODEL, SIZE, batch).norms
    two_passes = moved = 0
    divisions: list[tuple[int, int, int]] = []
    for inputs, y, groups in norms:
        skip = view(inputs[1]) if len(inputs) > 1 else None
        count, size, bytes_per_block = core.group_norm_silu_clusters(
            view(inputs[0]), skip, view(y), groups, card
        )
        apart = sum(group_norm_silu(inputs, y).values())
        two_passes += apart
        moved += sum(group_norm_silu_in_clusters(inputs, y).values()) if count else apart
        if count:
            divisions.append((size, count * size, bytes_per_block // 1024))
    spans = [f"{min(values)} to {max(values)}" for values in zip(*divisions, strict=True)]
    return [
        str(batch),
        f"{len(divisions)} of {len(norms)}",
        *spans,
        f"{two_passes / batch / 1e6:.1f}",
        f"{moved / batch / 1e6:.1f}",
    ]


def table(core: ModuleType) -> str:
    """Returns the table in Markdown."""
    columns = ["GPU", "batch", "norms in clusters", "blocks per cluster", "blocks", "KiB per block"]
    columns += ["MB per image in two passes", "MB per image"]
    rows = [[name, *row(core, card, batch)] for name, card in CARDS.items() for batch in BATCHES]
    return markdown(columns, rows)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.gpu.clusters", description=__doc__).parse_args()
    if core is None or not hasattr(core, "group_norm_silu_clusters"):
        sys.exit("the compiled core has no clusters: build it with CUDA for sm_90 or newer GPUs")
    print(table(core))
