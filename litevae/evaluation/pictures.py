"""Pictures of reconstructions and latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from litevae.data.pixels import Pixels, to_picture
from litevae.errors import one_line
from litevae.evaluation.metrics import psnr
from litevae.evaluation.reconstruction import decode, encode
from litevae.evaluation.yardsticks import HAAR, reconstruct_without_learning, yardstick_labels
from litevae.files import replacing
from litevae.models.interface import Autoencoder, spatial_compression
from litevae.plotting import DPI


def draw_reconstructions(
    model: Autoencoder, images: Sequence[tuple[str, Pixels]], path: Path, principal: bool = True
) -> None:
    """Draws one row per image: input, Haar yardstick, reconstruction, and latent as RGB.

    Args:
        model: autoencoder.
        images: label of the row and (H, W, C) pixels.
        path: PNG file to write.
        principal: whether to show principal components, as in `latents_as_rgb`.
    """
    factor = spatial_compression(model)
    latents = [encode(model, image) for _, image in images]
    colours = latents_as_rgb([latent[0].float().cpu() for latent in latents], principal)
    columns = ("input", yardstick_labels(model)[HAAR], "reconstruction", "latent as RGB")
    width, left, top = 3.6, 0.35, 0.55  # inches: a picture, and the margins
    heights = [width * image.shape[0] / image.shape[1] for _, image in images]
    gap = 0.1
    total_width = left + len(columns) * (width + gap)
    total_height = top + sum(heights) + gap * len(heights)

    figure = Figure(figsize=(total_width, total_height), dpi=DPI)
    figure.text(
        left / total_width,
        1 - 0.08 / total_height,
        f"{latents[0].shape[1]} latent channels at 1/{factor} of the size, shown by "
        f"their first three {'principal components' if principal else 'channels'}",
        va="top",
        fontsize=9,
        color="0.35",
    )
    y = total_height - top
    for row, (label, image) in enumerate(images):
        reconstruction = decode(model, latents[row], (image.shape[0], image.shape[1]))
        latent = np.kron(colours[row], np.ones((factor, factor, 1), np.uint8))
        yardstick = reconstruct_without_learning(model, image)[HAAR]
        pictures = (image, yardstick, reconstruction, latent[: image.shape[0], : image.shape[1]])
        y -= heights[row]
        for column, picture in enumerate(pictures):
            x = left + column * (width + gap)
            axes = figure.add_axes(
                (x / total_width, y / total_height, width / total_width, heights[row] / total_height)
            )
            axes.imshow(to_picture(picture), interpolation="antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(columns[column], fontsize=11, pad=4)
            if column == 0:
                name_row(axes, label)
            if column in (1, 2):
                axes.text(
                    0.98,
                    0.03,
                    f"{psnr(image, picture):.1f} dB",
                    transform=axes.transAxes,
                    ha="right",
                    fontsize=9,
                    color="white",
                    bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2},
                )
        y -= gap
    figure.savefig(path)


def name_row(axes: Axes, label: str) -> None:
    """Writes a label beside a picture. It loses as much of its middle as the picture's height has no room for."""
    room = axes.get_window_extent().height
    for longest in range(max(len(label), 4), 3, -1):
        if axes.set_ylabel(one_line(label, longest), fontsize=10).get_window_extent().height <= room:
            return


def latents_as_rgb(latents: Sequence[torch.Tensor], principal: bool = True) -> list[Pixels]:
    """Renders latents as (h, w, 3) uint8 pictures of their first three principal components.

    The components are computed over all latents together, so that a colour means the same in every picture. Each
    is scaled to the range between its 1st and 99th percentile.

    Args:
        latents: latents (n_z, h, w), float32.
        principal: whether to show principal components; False shows the first three channels as they are, like
            the paper's Figures 2 and 4.
    """
    latents = [latent.nan_to_num() for latent in latents]  # a model that diverged gets a picture too
    flat = torch.cat([latent.flatten(1) for latent in latents], dim=1).T  # (pixels, n_z)
    mean = flat.mean(dim=0)
    if principal:
        _, _, basis = torch.linalg.svd(flat - mean, full_matrices=False)
        # The sign with more positive loadings is taken, so that pictures are stable from run to run.
        basis = basis * torch.where(basis.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    else:
        basis = torch.eye(flat.shape[1])
    basis = basis[:3]
    values = (flat - mean) @ basis.T
    if values.shape[1] < 3:  # fewer latent channels than colours give grey
        values = values[:, :1].expand(-1, 3)
    low, high = np.percentile(values.numpy(), (1, 99), axis=0).astype(np.float32)
    pictures = []
    for latent in latents:
        components = (latent.flatten(1).T - mean) @ basis.T
        if components.shape[1] < 3:
            components = components[:, :1].expand(-1, 3)
        scaled = (components.numpy() - low) / np.maximum(high - low, 1e-6)
        rgb = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
        pictures.append(rgb.reshape(*latent.shape[1:], 3))
    return pictures


def draw_grid(pairs: Sequence[tuple[Pixels, Pixels]], path: Path, most: int = 8) -> None:
    """Draws the first `most` images, each beside its reconstruction, as a PNG; creates its folder."""
    rows = [np.concatenate([to_picture(each) for each in pair], axis=1) for pair in pairs[:most]]
    shape = sum(len(row) for row in rows), max(row.shape[1] for row in rows), rows[0].shape[2]
    grid = np.full(shape, 255, np.uint8)
    top = 0
    for row in rows:
        grid[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(grid).save(temporary)
