"""Fixtures of the 3x3 convolution's tests."""

import pytest

from litevae_kernels.backend import core

NAMES = ("baseline", "avx2", "avx512", "avx512bf16")
ISAS = () if core is None else NAMES[: NAMES.index(core.isa()) + 1]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test of the native kernels once for each instruction set of this CPU."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)
