"""The ratio of gradients in a run's log."""

import numpy as np
import pytest

from litevae.errors import UserError
from litevae.training.gradient_ratio import read_gradient_ratios


def test_ratios_are_read_from_the_log(gradient_runs):
    folder, ratios = gradient_runs
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
