"""The pictures of a training run, and what versions it ran on."""

import functools
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from litevae.evaluation.metrics import psnr
from litevae.evaluation.reconstruction import decode, encode
from litevae.images import Pixels
from litevae.models.baseline import Autoencoder, spatial_compression
from litevae.training.checkpoint import replacing

DPI = 120


def draw_reconstructions(
    model: Autoencoder, images: Sequence[tuple[str, Pixels]], path: Path, principal: bool = True
) -> None:
    """A row for each image: input, reconstruction, and latent as RGB.

    Args:
        images: what to write beside the row, and (H, W, 3) uint8.
        path: the PNG to write.
        principal: as in `latents_as_rgb`.
    """
    factor = spatial_compression(model)
    latents = [encode(model, image) for _, image in images]
    colours = latents_as_rgb([latent[0].float().cpu() for latent in latents], principal)
    columns = ("input", "reconstruction", "latent as RGB")
    width, left, top = 3.6, 0.35, 0.55  # inches; of a picture, and of the margins
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
        pictures = (image, reconstruction, latent[: image.shape[0], : image.shape[1]])
        y -= heights[row]
        for column, picture in enumerate(pictures):
            x = left + column * (width + gap)
            axes = figure.add_axes(
                (x / total_width, y / total_height, width / total_width, heights[row] / total_height)
            )
            axes.imshow(picture, interpolation="antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(columns[column], fontsize=11, pad=4)
            if column == 0:
                axes.set_ylabel(label, fontsize=10)
            if column == 1:
                axes.text(
                    0.98,
                    0.03,
                    f"{psnr(image, reconstruction):.1f} dB",
                    transform=axes.transAxes,
                    ha="right",
                    fontsize=9,
                    color="white",
                    bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2},
                )
        y -= gap
    figure.savefig(path)


def latents_as_rgb(latents: Sequence[torch.Tensor], principal: bool = True) -> list[Pixels]:
    """Latents (n_z, h, w), float32, as (h, w, 3) uint8 pictures by their first three principal components.

    The components are those of all the latents together, so that a colour means the same in every picture;
    each fills the range between its 1st and 99th percentile.

    Args:
        principal: False shows the first three channels as they are, like the paper's Figures 2 and 4.
    """
    latents = [latent.nan_to_num() for latent in latents]  # a diverged model gets its picture too
    flat = torch.cat([latent.flatten(1) for latent in latents], dim=1).T  # (pixels, n_z)
    mean = flat.mean(dim=0)
    if principal:
        _, _, basis = torch.linalg.svd(flat - mean, full_matrices=False)
        # of the two directions of a component, the one with more positive loadings: stable from run to run
        basis = basis * torch.where(basis.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    else:
        basis = torch.eye(flat.shape[1])
    basis = basis[:3]
    values = (flat - mean) @ basis.T
    if values.shape[1] < 3:  # fewer latent channels than colours: grey
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


def draw_curves(
    lines: Sequence[Mapping[str, Any]],
    terms: Sequence[str],
    history: Sequence[Mapping[str, float]],
    path: Path,
) -> None:
    """Losses over the steps on the left, the validation images' PSNR and SSIM on the right.

    Args:
        lines: one mapping a logged step, with "step", "loss" and those of the `terms` that were on.
        history: one mapping a measurement, with at least "step", "psnr" and "ssim".
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)

    for name in ("loss", *terms):
        having = [line for line in lines if name in line]
        steps, values = [line["step"] for line in having], [line[name] for line in having]
        (curve,) = left.plot(steps, smooth(values), label="total" if name == "loss" else name, linewidth=1.6)
        left.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)
    left.set(title="losses (unweighted terms, weighted total)", xlabel="step")
    if all(line.get(name, 1.0) > 0 for line in lines for name in ("loss", *terms)):
        left.set_yscale("log")
    else:  # an adversarial loss may be negative
        left.set_yscale("symlog", linthresh=1e-2)
    left.legend(fontsize=9, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16))

    at = [point["step"] for point in history]
    ssim_axes = right.twinx()
    right.plot(at, [point["psnr"] for point in history], "o-", markersize=3, color="C0")
    ssim_axes.plot(at, [point["ssim"] for point in history], "s-", markersize=3, color="C1")
    right.set(title="validation images", xlabel="step")
    right.set_ylabel("PSNR (dB)", color="C0")
    ssim_axes.set_ylabel("SSIM", color="C1")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    ssim_axes.spines["top"].set_visible(False)
    figure.savefig(path)


def draw_grid(pairs: Sequence[tuple[Pixels, Pixels]], path: Path, most: int = 8) -> None:
    """The first images, each beside its reconstruction, as a PNG; makes its folder."""
    rows = [np.concatenate(pair, axis=1) for pair in pairs[:most]]
    grid = np.full((sum(len(row) for row in rows), max(row.shape[1] for row in rows), 3), 255, np.uint8)
    top = 0
    for row in rows:
        grid[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(grid).save(temporary)


@functools.cache
def versions() -> str:
    """Of litevae, its git commit if it runs from a repository, and PyTorch."""
    try:
        own = version("litevae")
    except PackageNotFoundError:  # run from a source tree
        own = "not installed"
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = ""
    if (package.parent / ".git").exists():  # not some repository that the environment lies in
        try:
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            commit = "unknown"
    return f"litevae {own}" + (f" (commit {commit})" if commit else "") + f", torch {torch.__version__}"


def device_name() -> str:
    """The GPU, or the CPU's model and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found[1]
    count = torch.get_num_threads()
    return f"{model}, {count} thread{'s' * (count != 1)}"


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, without the pull of its start."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result
