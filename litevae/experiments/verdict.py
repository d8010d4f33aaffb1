"""The verdict on each statement of an experiment: whether it shows in the measured figures."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from litevae.experiments.spec import Claim, Experiment, matches
from litevae.experiments.trained import Row

# Prefixes of the metrics of which lower values are better.
LOWER_IS_BETTER = ("rfid", "lpips", "fid", "imbalance", "sigma", "spread", "worst", "memory")
# By metric: heading, and digits after the decimal point.
HEADINGS = {
    "rfid": ("rFID ↓", 2),
    "lpips": ("LPIPS ↓", 3),
    "psnr": ("PSNR ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "fid": ("FID ↓", 2),
    "seconds": ("seconds", 0),
}


def join_words(values: set[Any]) -> str:
    """Joins sorted values as in a sentence, such as "1, 2 and 3"."""
    *first, last = (f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(values))
    return f"{', '.join(first)} and {last}" if first else last


def heading_of(key: str) -> str:
    return HEADINGS[key][0] if key in HEADINGS else key


def number(value: float, key: str) -> str:
    if key in HEADINGS:
        return f"{value:,.{HEADINGS[key][1]}f}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def verdicts(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Returns for each claim whether it shows here, as lists in Markdown."""
    result = []
    for ours, title in (
        (False, "The paper's statements, and whether they show here:"),
        (True, "Not in the paper:"),
    ):
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
    """Judges figures measured during training: those of `than` are from its last validation within `better`'s time."""
    ours, theirs = [], []
    for mine, other in zip(better.trained, than.trained, strict=True):
        point = other.validated(within=mine.seconds)
        if point is None:
            return f"{than.spec.name} was not validated that early."
        ours.append(mine.record["validation"])
        theirs.append(point)
    steps = join_words({int(point["step"]) for point in theirs})
    found = [judge(claim, metric, ours, theirs) for metric in claim.metrics]
    return f"{'; '.join(found)}{one_seed(better)}; {than.spec.name} after {steps} of its steps."


def judge(
    claim: Claim, metric: str, better: Sequence[Mapping[str, Any]], than: Sequence[Mapping[str, Any]]
) -> str:
    """Judges one metric of a claim, as a phrase of the report.

    The seeds are paired: both rows saw the same crops in the same order. With several seeds a difference counts
    if its 95% confidence interval by Student's t excludes 0.
    """
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    gains = [sign * (mine[metric] - other[metric]) for mine, other in zip(better, than, strict=True)]
    gain, count = fmean(gains), len(gains)
    text = f"{heading_of(metric).rstrip(' ↓↑')} {sign * gain:+.3g}"
    margin = 0.0
    if count > 1:
        error = stdev(gains) / math.sqrt(count)
        margin = float(student.ppf(0.975, count - 1)) * error
        text += f" ± {margin:.2g}"
    if claim.at_least:
        shows = gain >= -margin
    elif abs(gain) <= margin:
        return f"{text}, no significant difference"
    else:
        shows = gain > 0
    return f"{text}, {'shows' if shows else 'does not show'}"
