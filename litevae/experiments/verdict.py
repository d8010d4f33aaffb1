"""The verdict on each statement of an experiment: whether it shows in the measured figures."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from litevae.experiments.spec import MARGINS, Claim, Experiment, matches
from litevae.experiments.trained import Row

# Prefixes of the metrics of which lower values are better.
LOWER_IS_BETTER = (
    "rfid",
    "lpips",
    "st_lpips",
    "fid",
    "imbalance",
    "sigma",
    "spread",
    "worst",
    "memory",
    "seconds",
)
# By metric: heading, and digits after the decimal point.
HEADINGS = {
    "rfid": ("rFID ↓", 2),
    "lpips": ("LPIPS ↓", 3),
    "st_lpips": ("ST-LPIPS (AlexNet) ↓", 3),
    "psnr": ("PSNR ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "fid": ("FID ↓", 2),
    "seconds": ("seconds", 0),
}

EXPLANATION = (
    "± is half the width of a 95% confidence interval by Student's t. A claim of a difference shows if the interval "
    "excludes 0, a claim to be as good if the interval lies above minus the margin. One seed gives no verdict."
)


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
    """Returns for each claim whether it shows here, as lists in Markdown, with an explanation of the verdicts."""
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
    return [*result, EXPLANATION] if result else []


def find(rows: Sequence[Row], name: str, among: str) -> Row:
    return next(row for row in rows if matches(row.spec, name, among))


def verdict(claim: Claim, better: Row, than: Row) -> str:
    timed = claim.equal_seconds or "seconds" in claim.metrics
    if timed and not all(trained.alone for row in (better, than) for trained in row.trained):
        return "Not judged: the runs did not have the machine to themselves."
    if claim.equal_seconds:
        return at_equal_seconds(claim, better, than)
    found = [
        judge(claim, metric, better.values, than.values)
        for metric in claim.metrics
        if all(metric in values for values in (*better.values, *than.values))
    ]
    return f"{'; '.join(found)}." if found else "Not measured at this scale."


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
    return f"{'; '.join(found)}; {than.spec.name} after {steps} of its steps."


def judge(
    claim: Claim, metric: str, better: Sequence[Mapping[str, Any]], than: Sequence[Mapping[str, Any]]
) -> str:
    """Judges one metric of a claim, as a phrase of the report.

    The seeds are paired: both rows saw the same crops in the same order. A verdict needs several seeds, and a 95%
    confidence interval of the gain that decides it: the gain must exclude 0; for a claim to be as good, the interval
    must lie above minus the metric's margin; for a claim with a factor, the ratio's interval must lie above it. If
    the measurements have error bars of their own, as those of Table 6, these are added in quadrature.
    """
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    if claim.factor == 1:
        gains = [sign * (mine[metric] - other[metric]) for mine, other in zip(better, than, strict=True)]
        least, text, suffix = 0.0, f"{sign * fmean(gains):+.3g}", ""
    else:
        gains = [(mine[metric] / other[metric]) ** sign for mine, other in zip(better, than, strict=True)]
        least, text, suffix = claim.factor, f"{fmean(gains):.3g}", " times better"
    name = heading_of(metric).rstrip(" ↓↑")
    if len(gains) == 1:
        return f"{name} {text}{suffix}, no verdict from one seed"
    gain, half_width = fmean(gains), confidence(gains)
    if (bar := error_bar(metric)) in better[0]:
        own = [math.hypot(mine[bar], other[bar]) for mine, other in zip(better, than, strict=True)]
        half_width = math.hypot(half_width, fmean(own))
    text = f"{name} {text} ± {half_width:.2g}{suffix}"
    if claim.at_least:
        margin = MARGINS[metric]
        least, text = -margin, f"{text} (margin {margin:g})"
    if gain - half_width > least:
        return f"{text}, shows"
    if gain + half_width < least:
        return f"{text}, does not show"
    return f"{text}, {'undecided' if claim.at_least or claim.factor != 1 else 'no significant difference'}"


def confidence(values: Sequence[float]) -> float:
    """Returns half the width of the 95% confidence interval of the mean of at least two values, by Student's t."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def error_bar(metric: str) -> str:
    """Returns the name of a metric's own error bar among the values of a row."""
    return f"± at {metric.removeprefix('sigma ')}"
