"""Constants and helpers that all plots share."""

from collections.abc import Sequence

DPI = 120


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Returns the exponential moving average of `values`, corrected for its bias towards the initial zero."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result
