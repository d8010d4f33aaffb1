import numpy as np
import pytest

from litevae.plotting import smooth


def test_smoothed_values_are_weighted_means_of_those_so_far():
    values = np.random.default_rng(0).normal(size=20).tolist()
    expected = [
        np.average(values[: n + 1], weights=[0.8 ** (n - i) for i in range(n + 1)]) for n in range(20)
    ]
    assert smooth(values, 0.8) == pytest.approx(expected, rel=1e-12)


def test_constant_and_empty_curves_stay_as_they_are():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50, rel=1e-12)
    assert smooth([]) == []
