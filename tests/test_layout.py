"""The layout that DESIGN and CONTRIBUTING promise: short files, and a test file for every module."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 400  # lines; kernels are excepted
KERNELS = ("cpu", "cuda", "triton")  # stems of files that may be longer


def modules(*packages: str) -> list[Path]:
    return [
        path.relative_to(ROOT)
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


def has_code(path: Path) -> bool:
    """Whether an `__init__.py` does more than export what other modules define."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return any(
        line.startswith(("class ", "def ")) and "__getattr__" not in line for line in text.splitlines()
    )


def expected_test_file(path: Path) -> Path:
    """Where the tests of a module are: its path below tests/; those of an `__init__.py` bear its folder's name."""
    stem = path.parent.name if path.stem == "__init__" else path.stem.strip("_")
    return Path("tests") / path.parent / f"test_{stem}.py"


TESTED = [path for path in modules("litevae", "litevae_kernels") if path.stem != "__init__" or has_code(path)]


@pytest.mark.parametrize("path", TESTED, ids=str)
def test_every_module_has_a_test_file_of_its_name(path):
    assert (ROOT / expected_test_file(path)).is_file(), f"{path}: there is no {expected_test_file(path)}"


@pytest.mark.parametrize(
    "path", modules("litevae", "litevae_kernels", "benchmarks", "tests", "docs", "examples"), ids=str
)
def test_no_file_is_too_long(path):
    count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert count <= LONGEST or path.stem in KERNELS, f"{path} has {count} lines"
