"""The table of what the Triton convolution takes of a GPU."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import resources


def test_each_convolution_with_a_residual_may_compute_statistics():
    found = resources.layers("litevae-s")
    with_residual = {layer[:3]: count for layer, count in found.items() if layer[3] == resources.RESIDUAL}
    assert with_residual
    assert with_residual == {
        layer[:3]: count for layer, count in found.items() if layer[3] == resources.STATISTICS
    }


@pytest.mark.parametrize("epilogue", ["", resources.RESIDUAL, resources.STATISTICS])
def test_a_launch_has_what_its_epilogue_needs(epilogue):
    kernel, arguments, _ = resources.launch(32, 16, 64, epilogue)
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    assert (given["residual"] is not None) == bool(epilogue)
    assert (given["partials"] is not None) == (epilogue == resources.STATISTICS)
