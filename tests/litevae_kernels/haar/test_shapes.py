import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import pywt

from litevae_kernels.haar.shapes import MODES, extension_index, level_sizes

NUMPY_MODES = {"symmetric": "symmetric", "constant": "edge", "reflect": "reflect", "periodic": "wrap"}


@pytest.mark.parametrize("mode", MODES)
def test_level_sizes_are_those_of_pywavelets(mode):
    for height, width in [(67, 2), (64, 48), (9, 13), (1, 1)]:
        sizes = level_sizes(height, width, 3)
        assert sizes[0] == (height, width)
        for before, after in itertools.pairwise(sizes):
            assert after == tuple(pywt.dwt_coeff_len(n, 2, mode) for n in before)


@pytest.mark.parametrize("mode", NUMPY_MODES)
def test_the_stand_in_is_the_sample_that_numpy_pads_with(mode):
    for n in (3, 5, 67):
        assert extension_index(n, mode) == np.pad(np.arange(n), (0, 1), mode=NUMPY_MODES[mode])[-1]


def test_the_modes_have_the_codes_of_the_core():
    header = Path(__file__).parents[3] / "csrc" / "haar" / "haar.h"
    values = re.search(r"enum class Mode : int \{(.*?)\}", header.read_text(), re.DOTALL)
    assert values is not None
    assert dict(re.findall(r"(\w+) = (\d+)", values[1])) == {mode: str(i) for i, mode in enumerate(MODES)}
