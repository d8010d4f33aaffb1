"""The plot of a training run's losses and validation metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from litevae.plotting import DPI, smooth


def draw_curves(
    lines: Sequence[Mapping[str, Any]],
    terms: Sequence[str],
    history: Sequence[Mapping[str, float]],
    yardstick: Mapping[str, float],
    path: Path,
) -> None:
    """Plots the losses over the steps on the left, and the PSNR and SSIM of the validation images on the right.

    Without validation images there is only the plot of the losses.

    Args:
        lines: one mapping per logged step, with "step", "loss" and the active `terms`.
        terms: names of the terms to plot.
        history: one mapping per validation, with at least "step", "psnr" and "ssim".
        yardstick: "psnr" and "ssim" of the Haar yardstick, drawn as dashed lines; empty for none.
        path: PNG file to write.
    """
    count = 2 if history else 1
    figure = Figure(figsize=(5 * count, 4), dpi=DPI, layout="constrained")
    left, *others = figure.subplots(1, count, squeeze=False)[0]
    for axes in (left, *others):
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)

    for name in ("loss", *terms):
        logged = [line for line in lines if name in line]
        steps, values = [line["step"] for line in logged], [line[name] for line in logged]
        (curve,) = left.plot(steps, smooth(values), label="total" if name == "loss" else name, linewidth=1.6)
        left.plot(steps, values, color=curve.get_color(), alpha=0.2, linewidth=0.8)
    left.set(title="losses (unweighted terms, weighted total)", xlabel="step")
    if all(line.get(name, 1.0) > 0 for line in lines for name in ("loss", *terms)):
        left.set_yscale("log")
    else:  # an adversarial loss may be negative
        left.set_yscale("symlog", linthresh=1e-2)
    left.legend(fontsize=9, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16))

    for right in others:
        steps = [point["step"] for point in history]
        ssim_axes = right.twinx()
        right.plot(steps, [point["psnr"] for point in history], "o-", markersize=3, color="C0")
        ssim_axes.plot(steps, [point["ssim"] for point in history], "s-", markersize=3, color="C1")
        right.set(title="validation images", xlabel="step")
        if yardstick:
            right.set_title("validation images (dashed: Haar yardstick)")
            for part, metric, color in ((right, "psnr", "C0"), (ssim_axes, "ssim", "C1")):
                if math.isfinite(yardstick[metric]):
                    part.axhline(yardstick[metric], color=color, linestyle="--", linewidth=1)
        right.set_ylabel("PSNR (dB)", color="C0")
        ssim_axes.set_ylabel("SSIM", color="C1")
        ssim_axes.spines["top"].set_visible(False)
    figure.savefig(path)
