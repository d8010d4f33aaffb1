"""Fixtures of all tests that run the kernels."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

# The benchmarks are not installed. The packages that are installed come before those of the checkout.
sys.path.append(str(Path(__file__).parents[1]))

# The variable is read at import; a developer's own setting must not affect the tests.
os.environ.pop("LITEVAE_BACKEND", None)

import litevae_kernels
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


@pytest.fixture
def under_the_interpreter(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Returns a function that passes if a file of tests does in a process that has TRITON_INTERPRET set.

    With `old_numpy` it skips where the interpreter fails on the reductions of these kernels.
    """

    def run(file: str, old_numpy: bool = False) -> None:
        root = Path(litevae_kernels.__file__).parents[1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.run(
            [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", "--color=no"],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if old_numpy and "only 0-dimensional arrays can be converted" in child.stdout:
            pytest.skip("the interpreter of this Triton needs NumPy below 2.5")
        assert child.returncode == 0, child.stdout + child.stderr
        assert re.search(r"\d+ passed", child.stdout), child.stdout

    return run
