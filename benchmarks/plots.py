"""Plots of one machine's figures as PNG files: bars for the encoders, curves for the growth of cost."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.harness import COPY

Row = dict[str, Any]
OURS, RIVAL, LINE = "#1f6fb4", "#8a8a8a", "#c0392b"
COLORS = (OURS, "#2e8b57", "#e08e0b", "#7d4fa8", "#17a2b8", "#6b4423")
HEADLINE = "encoders at their best"


def draw_all(device: str, rows: list[Row], folder: Path, stem: str) -> dict[str, Path]:
    """Draws every plot that `rows` have figures for, to `<stem>-<plot>.png` in `folder`; returns the files by title."""
    paths = {}

    def save(title: str, name: str, figure: Figure, of: list[Row]) -> None:
        dates = sorted({row["date"] for row in of})
        versions = sorted({row["torch"] for row in of})
        note = f"{device}; torch {', '.join(versions)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        figure.text(0.01, 0.01, note, fontsize=7, color="0.4")
        paths[title] = folder / f"{stem}-{name}.png"
        figure.savefig(paths[title], dpi=150)

    encoders = best_of_each([row for row in rows if row["subject"].startswith(HEADLINE)])
    if encoders:
        shape = encoders[0]["subject"].removeprefix(f"{HEADLINE}, ")
        title = f"Encoders at their best, {shape}: speed"
        save(
            title, "encoder-speed", bars(encoders, images_per_second, "speedup", "images/s", title), encoders
        )
        if all(row["peak_memory"] for row in encoders):
            title = f"Encoders at their best, {shape}: peak memory"
            figure = bars(encoders, megabytes, "memory_share", "MB beyond weights and images", title)
            save(title, "encoder-memory", figure, encoders)

    charts: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("chart"):
            charts.setdefault(row["chart"], []).append(row)
    for chart, points in charts.items():
        if chart.startswith("encoders over "):
            models = [row for row in points if row["images"]]
            what = chart.removeprefix("encoders over ")
            label = "side of the image, pixels" if what == "resolution" else "images per batch, 256 x 256"
            for name, unit, value in (
                ("speed", "images/s", images_per_second),
                ("memory", "peak MB beyond weights and images", megabytes),
            ):
                having = [row for row in models if name == "speed" or row["peak_memory"]]
                if not having:
                    continue
                title = f"Encoders: {unit.split()[0] if name == 'speed' else 'peak memory'} over {what}"
                save(title, f"{what}-{name}", curves(having, value, label, unit, title), having)
        else:
            kernel = chart.split()[0]
            label = "channels" if kernel == "modulate_weight" else "height and width, pixels"
            unit = "GB/s of the bytes that must be moved"
            figure = curves(points, lambda row: row["gigabytes_per_second"], label, unit, chart)
            save(f"Bandwidth over size: {chart}", f"{kernel.replace('_', '-')}-size", figure, points)
    return paths


def images_per_second(row: Row) -> float:
    return row["images"] / row["median_ms"] * 1e3


def megabytes(row: Row) -> float:
    return row["peak_memory"] / 1e6


def best_of_each(rows: list[Row]) -> list[Row]:
    """Returns the fastest row of each model, slowest first. A provider's first part is the model's name."""
    best: dict[str, Row] = {}
    for row in sorted((row for row in rows if row["images"]), key=images_per_second):
        best[model_of(row)] = row
    return sorted(best.values(), key=images_per_second)


def model_of(row: Row) -> str:
    return row["provider"].split(",")[0]


def canvas(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # room for the note
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(rows: list[Row], value: Callable[[Row], float], ratio: str, unit: str, title: str) -> Figure:
    """Draws one horizontal bar per model with its value, and for our models the `ratio` to the rival."""
    figure, axes = canvas(title, 3.2)
    ours = [model_of(row).startswith("LiteVAE") for row in rows]
    values = [value(row) for row in rows]
    drawn = axes.barh([model_of(row) for row in rows], values, color=[OURS if own else RIVAL for own in ours])
    labels = [
        f"{v:.3g}" + (f"  ({row[ratio]:.2g}x)" if own else "")
        for row, v, own in zip(rows, values, ours, strict=True)
    ]
    axes.bar_label(drawn, labels, padding=4, fontsize=9)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.18 * max(values))
    return figure


def curves(rows: list[Row], value: Callable[[Row], float], label: str, unit: str, title: str) -> Figure:
    """Draws one line per provider; the machine's copy of as many bytes is dashed."""
    figure, axes = canvas(title, 4.2)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["provider"], []).append(row)
    palette = itertools.cycle(COLORS)
    colors = {"SD-VAE": RIVAL}  # a model has one colour, as a whole or in tiles
    for provider, points in lines.items():
        points.sort(key=lambda row: row["x"])
        copied = provider.startswith(COPY)
        name, _, tiled = provider.partition(", tiles")
        if not copied and name not in colors:
            colors[name] = next(palette)
        axes.plot(
            [row["x"] for row in points],
            [value(row) for row in points],
            marker=None if copied else "s" if tiled else "o",
            markersize=4,
            linestyle="--" if copied else ":" if tiled else "-",
            color=LINE if copied else colors[name],
            label=provider,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["x"] for row in rows})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    return figure
