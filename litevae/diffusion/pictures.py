"""Pictures of a diffusion model's training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from litevae.data.pixels import to_picture
from litevae.plotting import DPI, smooth

GAP = 2  # pixels between samples


def draw_samples(samples: Tensor, path: Path) -> None:
    """Draws images (N, C, H, W) uint8 in a square grid with gaps, as a PNG."""
    samples = F.pad(samples, (0, GAP, 0, GAP), value=255)
    columns = math.ceil(math.sqrt(len(samples)))
    rows = math.ceil(len(samples) / columns)
    empty = rows * columns - len(samples)
    white = torch.full((empty, *samples.shape[1:]), 255, dtype=torch.uint8)
    tiles = torch.cat([samples.cpu(), white]).unflatten(0, (rows, columns))
    grid = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(to_picture(grid.contiguous().numpy())).save(path)


def draw_loss(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the loss in a run's log over the steps."""
    logged = [line for line in lines if "loss" in line]
    steps, losses = [line["step"] for line in logged], [line["loss"] for line in logged]
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="C0", linewidth=1.6)
    axes.set(xlabel="step", ylabel="weighted squared error")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
