"""Fixtures of all tests that run the kernels."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

# The benchmarks are not installed. The packages that are installed come before those of the checkout.
sys.path.append(str(Path(__file__).parents[1]))

# The variable is read at import; a developer's own setting must not affect the tests.
os.environ.pop("LITEVAE_BACKEND", None)

from litevae_kernels.backend import core

# The instruction sets of this CPU, or those up to LITEVAE_CPU_ISA.
ISAS: tuple[str, ...] = () if core is None else core.isas[: core.isas.index(core.isa()) + 1]


@contextmanager
def using(isa: str) -> Iterator[None]:
    assert core is not None
    before = core.isa()
    core.set_isa(isa)
    assert core.isa() == isa
    yield
    core.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of the native kernels once for each instruction set of this CPU."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=["reference", *(f"native-{name}" for name in ISAS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of the backends with the reference, and with the native one for each instruction set of this CPU."""
    name, _, isa = request.param.partition("-")
    with using(isa) if isa else nullcontext():
        yield name


@pytest.fixture
def fewer() -> Callable[[int], int]:
    """Returns a function that reduces a number of random cases to a quarter on all instruction sets but the best."""
    return lambda count: count if core is None or core.isa() == ISAS[-1] else -(-count // 4)
