"""An experiment's result as Markdown and JSON: our figures, and the paper's beside them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from litevae.experiments.runner import Row, Setup
from litevae.experiments.spec import Claim, Experiment, measured_size
from litevae.training.checkpoint import replacing
from litevae.training.report import device_name, versions

# metrics begin with one of these
LOWER_IS_BETTER = ("rfid", "lpips", "fid", "imbalance", "sigma", "spread", "worst")
# of a metric: its heading and the digits after the point
HEADINGS = {
    "rfid": ("rFID ↓", 2),
    "lpips": ("LPIPS ↓", 3),
    "psnr": ("PSNR ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "fid": ("FID ↓", 2),
    "seconds": ("seconds", 0),
}


def write_report(
    name: str,
    experiment: Experiment,
    setup: Setup,
    rows: Sequence[Row],
    pictures: Sequence[Path],
    seconds: float,
) -> Path:
    """Writes NAME.md and NAME.json into `setup.output` and returns the former's path.

    Args:
        name: of the experiment.
        pictures: to show, in the same folder.
        seconds: that the experiment took, without runs that it shares with earlier ones.
    """
    path = setup.output / f"{name}.md"
    text = [
        f"# {heading(name)}, {scale_in_words(setup)}: {experiment.title}",
        description(experiment, setup, rows),
        table(experiment, rows),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        *verdicts(experiment, rows),
        *([experiment.note] if experiment.note else []),
        f"{device_name()}; {versions()}; {date.today()}; {seconds:.0f} s"
        " for this experiment, training that it shares with others not counted again.",
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in text) + "\n", encoding="utf-8")
    record = {
        "experiment": name,
        "scale": setup.scale,
        "overrides": list(setup.overrides),
        "title": experiment.title,
        "rows": [
            {
                "row": row.spec.row,
                "paper": row.spec.paper,
                "values": row.values,
                "configurations": [asdict(trained.config) for trained in row.trained],
            }
            for row in rows
        ],
        "machine": device_name(),
        "versions": versions(),
        "date": str(date.today()),
        "seconds": round(seconds, 1),
    }
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def heading(name: str) -> str:
    """table09 -> Table 9."""
    name = Path(name).stem
    word, number = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    return f"{word.capitalize()} {int(number)}" if number else name


def scale_in_words(setup: Setup) -> str:
    return "tiny scale, not the paper's" if setup.scale == "tiny" else "the paper's setting"


def description(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> str:
    """What the models were trained on and for how long, and what was measured."""
    if not any(row.trained for row in rows):
        return ""
    configs = [trained.config for row in rows for trained in row.trained]
    steps = in_words({config.max_steps for config in configs})
    batch = in_words({config.data.batch_size for config in configs})
    sides = in_words({config.data.size for config in configs})
    images = (
        "scikit-image's photographs" if setup.scale == "tiny" else in_words({r.spec.dataset for r in rows})
    )
    sizes = in_words({measured_size(row.trained[0].config, row.spec, setup.scale) for row in rows})
    seeds = max(len(row.trained) for row in rows)
    if setup.scale == "paper":
        measured_on = "held-out images"
    elif experiment.kind in ("mmd", "generation"):
        measured_on = "squares of the same photographs, of which the held-out one has too few"
    else:
        measured_on = "squares of a photograph that no model was trained on"
    text = (
        f"Trained for {steps} steps of {batch} crops of {images}, {sides} pixels a side"
        + (f", with {seeds} seeds (mean ± standard deviation)" if seeds > 1 else ", one seed")
        + f". Measured at {sizes} pixels on {measured_on}."
    )
    if setup.scale == "tiny":
        text += (
            " Encoders are whole, decoders, steps and images much smaller than the paper's: its figures stand"
            " beside ours to show what the experiment is about, not to be compared with them. Rows that differ"
            " only in the data set or in what this scale leaves out show the same run."
        )
    if setup.overrides:
        text += f" Changed by hand: {', '.join(setup.overrides)}."
    return text


def in_words(values: set[Any]) -> str:
    """1 and 2."""
    *first, last = (f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(values))
    return f"{', '.join(first)} and {last}" if first else last


def table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Markdown: the experiment's columns, ours, the paper's."""
    ours = list(dict.fromkeys(key for row in rows for values in row.values for key in values))
    paper = list(dict.fromkeys(key for row in rows for key in row.spec.paper))
    head = [
        *experiment.columns,
        *(f"ours: {title(key)}" for key in ours),
        *(f"paper: {title(key)}" for key in paper),
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [mean_and_spread([v[key] for v in row.values if key in v], key) for key in ours]
        published = [number(row.spec.paper[key], key) if key in row.spec.paper else "" for key in paper]
        lines.append([*row.spec.row, *cells, *published])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(key: str) -> str:
    return HEADINGS[key][0] if key in HEADINGS else key


def number(value: float, key: str) -> str:
    if key in HEADINGS:
        return f"{value:,.{HEADINGS[key][1]}f}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def mean_and_spread(values: Sequence[float], key: str) -> str:
    if not values:
        return ""
    mean = number(fmean(values), key)
    return f"{mean} ± {number(stdev(values), key)}" if len(values) > 1 else mean


def verdicts(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """For each claim whether it shows here, as a list in Markdown."""
    lines = []
    for claim in experiment.claims:
        better, than = (find(rows, name, claim.among) for name in (claim.better, claim.than))
        found = [verdict(claim, metric, better, than) for metric in claim.metrics if measured(better, metric)]
        lines.append(f"- {claim.text} {'; '.join(found) if found else 'Not measured at this scale'}.")
    return ["What the paper says, and what shows here:\n\n" + "\n".join(lines)] if lines else []


def find(rows: Sequence[Row], name: str, among: str) -> Row:
    return next(row for row in rows if row.spec.name == name and among in ("", row.spec.row[0]))


def measured(row: Row, metric: str) -> bool:
    return all(metric in values for values in row.values)


def verdict(claim: Claim, metric: str, better: Row, than: Row) -> str:
    """Seeds are paired: both rows saw the same crops in the same order."""
    if claim.equal_seconds:
        others = [
            other.after(mine.seconds)[metric]
            for mine, other in zip(better.trained, than.trained, strict=True)
        ]
    else:
        others = [values[metric] for values in than.values]
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    gains = [sign * (values[metric] - other) for values, other in zip(better.values, others, strict=True)]
    gain = fmean(gains)
    text = f"{title(metric).rstrip(' ↓↑')} {sign * gain:+.3g}"
    if len(gains) > 1:
        error = stdev(gains) / math.sqrt(len(gains))
        text += f" ± {error:.2g}"
        if abs(gain) < 2 * error:
            return f"{text}, no difference that shows"
    return f"{text}, {'shows' if gain > 0 else 'does not show'}" + (
        " (one seed)" if len(better.trained) == 1 else ""
    )
