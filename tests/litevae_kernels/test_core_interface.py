from pathlib import Path

import litevae_kernels
from litevae_kernels.backend import core
from litevae_kernels.core_interface import INTERFACE, OPERATORS

PACKAGE = Path(litevae_kernels.__file__).parent
CSRC = Path(__file__).parents[2] / "csrc"


def test_the_core_was_built_from_this_file():
    assert core is not None
    assert core.interface == INTERFACE
    assert core.operators == OPERATORS


def test_every_operator_is_listed_and_has_its_files():
    assert {path.parent.name for path in PACKAGE.glob("*/op.py")} == set(OPERATORS)
    assert {path.parent.name for path in CSRC.glob("*/bindings.cpp")} == set(OPERATORS)
    for operator in OPERATORS:
        for name in ("__init__", "op", "native", "reference"):
            assert (PACKAGE / operator / f"{name}.py").exists()
        assert (CSRC / operator / f"{operator}.h").exists()
