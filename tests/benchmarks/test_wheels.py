"""The choice of the packages that travel to a GPU machine, from wheels without code."""

import zipfile

import pytest
from packaging.requirements import Requirement


@pytest.fixture
def fetch(tmp_path):
    """Returns a stand-in for the index: the function that makes a wheel, and the list of what it made."""
    depends = {
        "a": ["B_b>=1", 'c; python_version < "3.11"', 'd; extra == "more"'],
        "b-b": ["torch", "e"],
        "e": ["a"],
    }
    made = []

    def make(requirement):
        name = requirement.name.lower().replace("_", "-")
        made.append(name)
        wheel = tmp_path / f"{name}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            lines = [f"Requires-Dist: {line}" for line in depends.get(name, [])]
            archive.writestr(f"{name}-1.dist-info/METADATA", "\n".join(["Name: x", *lines, "", "Text"]))
        return wheel

    return make, made


def test_each_needed_package_travels_once(fetch, monkeypatch):
    from benchmarks.gpu import wheels

    make, made = fetch
    present = wheels.installed("Package Version\n------- -------\ntorch   2.11\nPillow==12\n")
    assert {"torch", "pillow"} <= present
    found = wheels.collect(
        [Requirement("a"), Requirement("pillow")], present, make, {"python_version": "3.12"}
    )
    assert made == ["a", "b-b", "e"]
    assert [wheel.stem for wheel in found] == made


def test_the_package_and_the_steps_are_wanted():
    from benchmarks.gpu import wheels

    names = {requirement.name for requirement in wheels.wanted()}
    assert {"diffusers", "torch", "pytest-xdist"} <= names
