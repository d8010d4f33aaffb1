"""The ratio of the adversarial to the reconstruction gradient over a training run (Section 6, Figure 7)."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from litevae.errors import UserError
from litevae.files import why_missing
from litevae.plotting import DPI
from litevae.training.metrics_log import read_log
from litevae.training.step import GRADIENT_RATIO


@dataclass(frozen=True)
class GradientRatios:
    """The `ratios` at `steps`, as `TrainingStep.gradient_ratio` defines them; 1 is balanced.

    `median` is their median; `low` and `high` are their 5th and 95th percentiles.
    """

    steps: tuple[int, ...]
    ratios: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The 95th percentile divided by the 5th; at least 1."""
        return self.high / self.low


def read_gradient_ratios(run: Path) -> GradientRatios:
    """Reads the ratios that a run with `gradient_ratio_every` has logged, without those that are 0.

    Args:
        run: output folder of the run, with metrics.jsonl.

    Raises:
        UserError: there is no such folder or log, or the log has no ratio.
    """
    path = run / "metrics.jsonl"
    if not os.path.isfile(path):
        reason = "not a training run: there is no metrics.jsonl"
        raise UserError(f"{run}: {reason if os.path.isdir(run) else why_missing(run, 'folder')}")
    lines = [line for line in read_log(path, sys.maxsize) if is_positive(line.get(GRADIENT_RATIO))]
    if not lines:
        raise UserError(
            f"{path} has no {GRADIENT_RATIO} above 0: train with loss.adversarial and gradient_ratio_every "
            "above 0, past loss.adversarial_start"
        )
    ratios = [line[GRADIENT_RATIO] for line in lines]
    low, median, high = np.percentile(ratios, (5, 50, 95)).tolist()
    return GradientRatios(tuple(line["step"] for line in lines), tuple(ratios), median, low, high)


def is_positive(value: object) -> bool:
    """Returns whether a value of a log is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def draw_gradient_ratios(runs: Mapping[str, GradientRatios], path: Path) -> None:
    """Plots the ratios over the steps on a logarithmic scale, one line per run.

    Args:
        runs: ratios by the name of the run.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        label = f"{name}: median {run.median:.3g}, 5th to 95th percentile {run.low:.3g} to {run.high:.3g}"
        marker = "o" if len(run.steps) < 50 else ""
        axes.plot(run.steps, run.ratios, label=label, linewidth=1.2, marker=marker, markersize=3)
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="gradient norm, adversarial / reconstruction",
        title="weighted adversarial against weighted reconstruction loss, all trained parameters",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path)
