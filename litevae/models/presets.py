"""The paper's encoder sizes: Table 23 (feature extraction) and Table 24 (feature aggregation)."""

import difflib
from typing import Any

from litevae.errors import shorten

PRESETS: dict[str, dict[str, Any]] = {
    "litevae-s": {
        "extractor_channels": 16,
        "extractor_multipliers": (1, 2, 2),
        "aggregator_channels": 16,
        "aggregator_multipliers": (1, 2, 2),
        # The usual 32 groups do not divide 16 channels, nor the 48 after a concatenation.
        "encoder_num_groups": 16,
    },
    "litevae-b": {
        "extractor_channels": 32,
        "extractor_multipliers": (1, 2, 3),
        "aggregator_channels": 32,
        "aggregator_multipliers": (1, 2, 3),
    },
    "litevae-m": {
        "extractor_channels": 64,
        "extractor_multipliers": (1, 2, 4),
        "aggregator_channels": 32,
        "aggregator_multipliers": (1, 2, 3),
    },
    "litevae-l": {
        "extractor_channels": 64,
        "extractor_multipliers": (1, 2, 4),
        "aggregator_channels": 64,
        "aggregator_multipliers": (1, 2, 4),
    },
}


def get_preset(name: str) -> dict[str, Any]:
    """Returns the constructor arguments of a preset, or raises ValueError that names the nearest preset."""
    if isinstance(name, str) and name in PRESETS:
        return dict(PRESETS[name])
    nearest = difflib.get_close_matches(str(name)[:100].lower(), PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown preset {shorten(name)}: did you mean {nearest!r}? (presets: {', '.join(PRESETS)})"
    )
