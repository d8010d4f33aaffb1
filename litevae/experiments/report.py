"""An experiment's result as Markdown and JSON: our figures, and the paper's beside them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from litevae.environment import device_name, versions
from litevae.experiments.spec import Claim, Experiment, Setup, matches, measured_size
from litevae.experiments.trained import Row
from litevae.files import replacing
from litevae.training.config import list_stages

# metrics begin with one of these
LOWER_IS_BETTER = ("rfid", "lpips", "fid", "imbalance", "sigma", "spread", "worst", "memory")
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
    changed = ", changed by hand" if setup.overrides else ""
    text = [
        f"# {heading(name)}, {setup.at.description}{changed}: {experiment.title}",
        description(experiment, setup, rows),
        table(experiment, rows),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        *verdicts(experiment, rows),
        experiment.note,
        f"{device_name()}; {versions()}; {date.today()}; {seconds:.0f} s for this experiment, without models that "
        "others had trained before.",
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in text if part) + "\n", encoding="utf-8")
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
                "images": row.count,
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


def description(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> str:
    """What the models were trained on and for how long, and what was measured."""
    if experiment.kind == "complexity":
        return (
            f"Encoders, batch {setup.at.complexity_batch}, 256 x 256 pixels, float32, eager, channels_last."
        )
    configs = [trained.config for row in rows for trained in row.trained]
    steps = in_words({config.max_steps for config in configs})
    batch = in_words({config.data.batch_size for config in configs})
    sides = in_words({stage.size for config in configs for stage in list_stages(config)})
    images = "scikit-image's photographs" if setup.at.demo else in_words({row.spec.dataset for row in rows})
    seeds = max(len(row.trained) for row in rows)
    text = (
        f"Trained for {steps} steps of {batch} crops of {images}, {sides} pixels a side"
        + (f", with {seeds} seeds (mean ± standard deviation)" if seeds > 1 else ", one seed")
        + f". {measurement(experiment, setup, rows)}"
    )
    if setup.at.demo:
        text += (
            " The encoders are the paper's; images, steps, and at the tiny scale decoders, are much smaller: the"
            " paper's figures stand beside ours to show what the experiment is about, not to be compared with"
            " them. Rows that differ only in the data set, or in what this scale leaves out, show the same run."
        )
    if setup.overrides:
        text += f" Changed by hand: {', '.join(setup.overrides)}."
    return text


def measurement(experiment: Experiment, setup: Setup, rows: Sequence[Row]) -> str:
    if experiment.kind == "gradients":
        return "Measured during training."
    counts = in_words({row.count for row in rows})
    if experiment.kind == "resolution":
        sizes = in_words({size // setup.at.size for size in experiment.sizes})
    else:
        sizes = in_words({measured_size(row.trained[0].config, row.spec, setup.at) for row in rows})
    if experiment.kind == "generation":
        return f"The second stage learns {counts} latents of {sizes} pixels a side, and their mirror images'."
    whose = "held-out images"
    if setup.at.demo:
        whose = (
            "squares of the photographs that they were trained on"
            if experiment.kind == "mmd"
            else "squares of a photograph that no model was trained on"
        )
    return f"Measured on {counts} {whose}, {sizes} pixels a side, 8 bits, " + (
        "samples of the posterior." if experiment.kind == "mmd" else "mode of the posterior."
    )


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
    """For each claim whether it shows here, as lists in Markdown."""
    result = []
    for ours, title in ((False, "What the paper says, and what shows here:"), (True, "Not in the paper:")):
        lines = [
            f"- {claim.text} {verdict(claim, *(find(rows, name, claim.among) for name in (claim.better, claim.than)))}"
            for claim in experiment.claims
            if claim.ours == ours
        ]
        if lines:
            result.append(f"{title}\n\n" + "\n".join(lines))
    return result


def find(rows: Sequence[Row], name: str, among: str) -> Row:
    return next(row for row in rows if matches(row.spec, name, among))


def verdict(claim: Claim, better: Row, than: Row) -> str:
    if claim.equal_seconds:
        return at_equal_seconds(claim, better, than)
    found = [
        judge(claim, metric, better.values, than.values)
        for metric in claim.metrics
        if all(metric in values for values in (*better.values, *than.values))
    ]
    return f"{'; '.join(found)}{one_seed(better)}." if found else "Not measured at this scale."


def one_seed(row: Row) -> str:
    return " (one seed)" if len(row.trained) == 1 else ""


def at_equal_seconds(claim: Claim, better: Row, than: Row) -> str:
    """Both as they were measured during training: `than` at its last validation within `better`'s seconds."""
    ours, theirs = [], []
    for mine, other in zip(better.trained, than.trained, strict=True):
        point = other.validated(within=mine.seconds)
        if point is None:
            return f"{than.spec.name} was not validated that early."
        ours.append(mine.record["validation"])
        theirs.append(point)
    steps = in_words({int(point["step"]) for point in theirs})
    found = [judge(claim, metric, ours, theirs) for metric in claim.metrics]
    return f"{'; '.join(found)}{one_seed(better)}; {than.spec.name} after {steps} of its steps."


def judge(
    claim: Claim, metric: str, better: Sequence[Mapping[str, Any]], than: Sequence[Mapping[str, Any]]
) -> str:
    """Seeds are paired: both rows saw the same crops in the same order.

    With several seeds a difference counts that has 95 % confidence by Student's t.
    """
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    gains = [sign * (mine[metric] - other[metric]) for mine, other in zip(better, than, strict=True)]
    gain, count = fmean(gains), len(gains)
    text = f"{title(metric).rstrip(' ↓↑')} {sign * gain:+.3g}"
    margin = 0.0
    if count > 1:
        error = stdev(gains) / math.sqrt(count)
        margin = float(student.ppf(0.975, count - 1)) * error
        text += f" ± {margin:.2g}"
    if claim.at_least:
        shows = gain >= -margin
    elif abs(gain) <= margin:
        return f"{text}, no difference that shows"
    else:
        shows = gain > 0
    return f"{text}, {'shows' if shows else 'does not show'}"
