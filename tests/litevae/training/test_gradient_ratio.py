"""The ratio of gradients in a run's log."""

import json

import numpy as np
import pytest

from litevae.errors import UserError
from litevae.training.gradient_ratio import read_gradient_ratios


@pytest.fixture
def runs(tmp_path):
    """Logs in the trainer's format, with the ratio on some of the lines."""
    ratios = {"constant": [0.5, 0.4, 0.2, 0.1], "adaptive": [100.0, 0.01, 3.0]}
    for name, values in ratios.items():
        (tmp_path / name).mkdir()
        lines = [{"step": 1, "loss": 1.0}, {"step": 2, "skipped": "the loss is nan", "skipped_steps": 1}]
        lines += [{"step": 10 * i, "gradient_ratio": value} for i, value in enumerate(values, start=1)]
        lines += [{"step": 99, "gradient_ratio": 0.0}]  # cannot be drawn on a logarithmic scale
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 100, "gradi')  # the run was killed
    return tmp_path, ratios


def test_ratios_are_read_from_the_log(runs):
    folder, ratios = runs
    found = read_gradient_ratios(folder / "constant")
    assert found.steps == (10, 20, 30, 40)
    assert found.ratios == tuple(ratios["constant"])
    low, median, high = np.percentile(ratios["constant"], [5, 50, 95])
    assert (found.low, found.median, found.high) == (low, median, high)
    assert found.spread == high / low


def test_a_run_without_a_ratio_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_gradient_ratios(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no metrics\.jsonl"):
        read_gradient_ratios(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="no gradient_ratio above 0: train with"):
        read_gradient_ratios(tmp_path)
