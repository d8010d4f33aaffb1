from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from litevae import settings
from litevae.errors import UserError


@dataclass
class Part:
    example: ClassVar[str] = "{count: 3}"
    count: int = 1


@dataclass
class Section:
    weight: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclass
class Settings:
    steps: int = 5
    name: str = ""
    section: Section = field(default_factory=Section)
    parts: list[Part] = field(default_factory=list)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shipped" / "other").mkdir(parents=True)
    (tmp_path / "shipped" / "plain.yaml").write_text("steps: 7\nsection:\n  weight: 2")
    (tmp_path / "shipped" / "other" / "hidden.yaml").write_text("anything: 1")
    return tmp_path / "shipped"


def fails(folder, name, *overrides):
    with pytest.raises(UserError) as caught:
        settings.load(Settings, name, overrides, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_then_overrides(folder):
    loaded = settings.load(Settings, "plain", ["section.kind=b", "parts=[{count: 4}]", "name="], folder)
    assert loaded == Settings(7, "", Section(2.0, "b"), [Part(4)])


def test_folders_below_hold_other_kinds(folder):
    assert settings.shipped(folder) == ["plain"]
    assert "no configuration named 'other/hidden'" in fails(folder, "other/hidden")
    assert "did you mean 'plain'? (there are: plain; or give" in fails(folder, "plian")


def test_a_file_extends_another(folder, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: plain\nsteps: 9")
    expected = settings.load(Settings, "plain", ["steps=9"], folder)
    assert settings.load(Settings, str(path), (), folder) == expected
    path.write_text(f"extends: {path}")
    assert "extends itself" in fails(folder, str(path))
    path.write_text("extends: plian")
    assert "did you mean 'plain'?" in fails(folder, str(path))


def test_missing_file_is_named(folder):
    assert "nowhere.yaml: no such file" in fails(folder, "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step: 3", "did you mean 'steps'?"),
        ("weight: 3", "did you mean 'section.weight'?"),
        ("section:\n  weight: much", "section.weight must be a number"),
        ("section:\n  kind: c", "section.kind must be a or b"),
        ("section:", "section must be set key by key, such as section.weight=..."),
        ("parts: 3", "parts must be a list such as [{count: 3}], each with the settings count"),
        ("- 1\n- 2", "must be a mapping"),
        ("a: [1", "cannot be read"),
        ("3", "cannot be read"),
    ],
)
def test_mistake_in_a_file_names_the_file(folder, tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = fails(folder, str(path))
    assert str(path) in message
    assert expected in message


def test_numbers_out_of_range_are_refused():
    config = Settings(section=Section(weight=3.0))
    settings.check_range(config, {"steps": 5}, {"section.weight": 3})
    with pytest.raises(UserError, match=r"steps must be 6 or more, got 5"):
        settings.check_range(config, {"steps": 6}, {})
    with pytest.raises(UserError, match=r"section.weight must be 2 or less, got 3.0"):
        settings.check_range(config, {}, {"section.weight": 2})
    config.section.weight = float("nan")
    with pytest.raises(UserError, match=r"section.weight must be 0 or more, got nan"):
        settings.check_range(config, {"section.weight": 0}, {})
