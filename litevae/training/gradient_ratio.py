"""The adversarial gradient against the reconstruction's over a training run (Section 6, Figure 7)."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from litevae.errors import UserError
from litevae.plotting import DPI
from litevae.training.metrics_log import read_log
from litevae.training.step import GRADIENT_RATIO


@dataclass(frozen=True)
class GradientRatios:
    """`ratios` at `steps`, as `TrainingStep.gradient_ratio` defines them: 1 is balanced.

    `median`, and `low` and `high`, their 5th and 95th percentiles.
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
    """What a run that was trained with `gradient_ratio_every` has logged, where neither gradient is 0 or infinite.

    Args:
        run: the output folder, with metrics.jsonl in it.

    Raises:
        UserError: no such folder or log, or a log without any ratio.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{run}: {'not a training run: there is no metrics.jsonl' if run.is_dir() else 'no such folder'}"
        )
    lines = [line for line in read_log(path, sys.maxsize) if line.get(GRADIENT_RATIO, 0) > 0]
    if not lines:
        raise UserError(
            f"{path} has no {GRADIENT_RATIO} above 0: train with loss.adversarial and gradient_ratio_every "
            "above 0, past loss.adversarial_start"
        )
    ratios = [line[GRADIENT_RATIO] for line in lines]
    low, median, high = np.percentile(ratios, (5, 50, 95)).tolist()
    return GradientRatios(tuple(line["step"] for line in lines), tuple(ratios), median, low, high)


def draw_gradient_ratios(runs: Mapping[str, GradientRatios], path: Path) -> None:
    """The ratios over the steps on a logarithmic scale, a line for each run.

    Args:
        runs: by name.
        path: the PNG to write.
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
