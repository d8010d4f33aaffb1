"""Reconstruction quality at different resolutions (Figures 5 and 8)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from litevae.data.sources import ImageSource
from litevae.errors import UserError
from litevae.evaluation.complexity import measure_complexity
from litevae.evaluation.evaluate import Evaluation, check_metrics, evaluate
from litevae.evaluation.metrics import check_metric_sizes
from litevae.models.interface import Autoencoder, check_size
from litevae.plotting import DPI

SIZES = (64, 128, 256, 512)
LABELS = {
    "rfid": "rFID (lower is better)",
    "lpips": "LPIPS (lower is better)",
    "st_lpips": "ST-LPIPS with AlexNet (lower is better)",
    "psnr": "PSNR in dB (higher is better)",
    "ssim": "SSIM (higher is better)",
}


def sweep_resolutions(
    models: Mapping[str, Autoencoder],
    images: ImageSource,
    sizes: Sequence[int] = SIZES,
    metrics: Sequence[str] = ("psnr", "ssim"),
    count: int | None = None,
    batch_size: int = 16,
    workers: int = 4,
) -> dict[str, dict[int, Evaluation]]:
    """Evaluates each model at each size, on the same images.

    Every model is first checked at every size, so that none fails after others were measured.

    Args:
        models: autoencoders by name, each on the device and in the dtype to run in.
        images: source of the images.
        sizes: sides of the squares in pixels. Smaller images are enlarged.
        metrics, count, batch_size, workers: as in `evaluate`.

    Returns:
        The results by name and size, in the given order.

    Raises:
        UserError: a model or a metric does not take a size (a model with a Vision Transformer takes a single size),
            or as `evaluate`.
    """
    check_metrics(metrics)
    check_metric_sizes(metrics, sizes)
    for name, model in models.items():
        for size in sizes:
            check_takes(name, model, size)
    return {
        name: {size: evaluate(model, images, metrics, size, count, batch_size, workers) for size in sizes}
        for name, model in models.items()
    }


def check_takes(name: str, model: Autoencoder, size: int) -> None:
    """Raises UserError, with the model's `name`, unless it takes images of `size` pixels. Nothing is computed."""
    try:
        check_size(model, size)
        measure_complexity(model, size)
    except ValueError as error:
        raise UserError(f"{name} does not take images of {size} x {size} pixels: {error}") from None


def relative_degradation(values: Mapping[int, float], metric: str, trained_size: int) -> dict[int, float]:
    """Returns how much worse a model is at each size than at its training size, in percent of the latter.

    Values above 0 are worse, whichever direction of the metric is better. PSNR counts in percent of its dB. If
    the training size is not among the sizes, the best value takes its place. This is our reading of
    "performance degradation when evaluating the model at different resolutions" (Section 5); the paper gives no
    formula.

    Args:
        values: values of the metric by size.
        metric: name of the metric, as in `evaluate`.
        trained_size: the model's `config.sample_size`, in pixels.

    Returns:
        The degradation by size; NaN where the reference is 0 or infinite.
    """
    sign = 1 if metric in ("psnr", "ssim") else -1
    best = max(values.values(), key=lambda value: sign * value)
    reference = values.get(trained_size, best)
    if reference == 0 or not math.isfinite(reference):
        return dict.fromkeys(values, math.nan)
    return {size: 100 * sign * (reference - value) / abs(reference) for size, value in values.items()}


def draw_resolutions(
    values: Mapping[str, Mapping[int, Mapping[str, float]]], trained_sizes: Mapping[str, int], path: Path
) -> None:
    """Plots each metric against the resolution, and the relative degradation below it; one line per model.

    Args:
        values: values by model, size and metric; all models have the same sizes and metrics.
        trained_sizes: training size of each model, as in `relative_degradation`.
        path: PNG file to write.
    """
    sizes = sorted(next(iter(values.values())))
    metrics = list(next(iter(values.values()))[sizes[0]])
    figure = Figure(figsize=(max(5.5, 4.2 * len(metrics)), 7), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(metrics), squeeze=False, sharex=True)
    for column, metric in enumerate(metrics):
        upper, lower = axes[:, column]
        for index, (name, by_size) in enumerate(values.items()):
            series = {size: by_size[size][metric] for size in sizes}
            change = relative_degradation(series, metric, trained_sizes[name])
            style = {"marker": "osD^v<>P"[index % 8], "markersize": 5, "linewidth": 1.6}
            label = f"{name} (trained at {trained_sizes[name]})"
            upper.plot(sizes, list(series.values()), label=label, **style)
            lower.plot(sizes, list(change.values()), **style)
        upper.set(title=LABELS[metric], ylabel=LABELS[metric].partition(" (")[0])
        lower.axhline(0, color="0.5", linewidth=0.8)
        lower.set(
            xscale="log", xlabel="resolution (pixels per side)", ylabel="degradation (%; above 0 is worse)"
        )
        lower.set_xticks(sizes, [str(size) for size in sizes])
        lower.xaxis.set_minor_locator(NullLocator())
        for part in (upper, lower):
            part.grid(alpha=0.25)
            part.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    figure.savefig(path)
