import os
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from litevae import settings
from litevae.errors import UserError
from litevae.settings import section, setting


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


@dataclass
class Inner:
    example: ClassVar[str] = "{depth: 3}"
    depth: int = setting(1, "Depth.", minimum=1)


@dataclass
class Ranges:
    steps: int = setting(5, "Steps.", minimum=1, maximum=9)
    fraction: float = setting(0.5, "Fraction.", minimum=0, below=1)
    ceiling: float = setting(1.0, "Number with an upper limit only.", maximum=5)
    optional: int | None = setting(None, "Optional number.", minimum=1)
    widths: list[int] = setting([4, 8], "Widths.", minimum=1)
    betas: tuple[float, float] = setting((0.5, 0.9), "Betas.", minimum=0, below=1)
    inner: Inner = section(Inner, "Inner section.")
    entries: list[Inner] = setting([], "Entries.")
    other: dict[str, float] = field(default_factory=dict)  # without limits


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


def test_subfolders_hold_other_kinds(folder):
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
        ("3", "must be a mapping"),
        ("0", "must be a mapping"),
    ],
)
def test_mistake_in_a_file_names_the_file(folder, tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = fails(folder, str(path))
    assert str(path) in message
    assert expected in message


def test_a_copy_of_a_list_is_the_default():
    Ranges().widths.append(5)
    assert Ranges().widths == [4, 8]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps must be 1 or more, got 0"),
        ("steps=10", "steps must be 9 or less, got 10"),
        ("fraction=1", "fraction must be below 1, got 1.0"),
        ("fraction=nan", "fraction must be 0 or more, got nan"),
        ("fraction=inf", "fraction must be 0 or more, got inf"),
        ("ceiling=nan", "ceiling must be 5 or less, got nan"),
        ("optional=0", "optional must be 1 or more, got 0"),
        ("widths=[4,0]", "widths must all be 1 or more, got [4, 0]"),
        ("widths=[[],4]", "widths must hold single values, got [[], 4]"),
        ("widths=[4,{}]", "widths must hold single values, got [4, {}]"),
        ("betas=[0.5,1]", "betas must all be below 1, got [0.5, 1.0]"),
        ("inner.depth=0", "inner.depth must be 1 or more, got 0"),
        ("entries=[{depth: 1}, {depth: 0}]", "entries[1].depth must be 1 or more, got 0"),
    ],
)
def test_number_out_of_range_is_refused(override, message):
    with pytest.raises(UserError) as caught:
        settings.load(Ranges, None, [override])
    assert str(caught.value) == message


def test_numbers_at_the_limits_are_allowed():
    overrides = ["steps=9", "fraction=0", "ceiling=-1e300", "optional=null", "widths=[]", "betas=[0,0.99]"]
    loaded = settings.load(Ranges, None, [*overrides, "entries=[{depth: 1}]", "other={a: -inf}"])
    assert (loaded.steps, loaded.optional, loaded.widths) == (9, None, [])


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (settings.Limits(1, 4096), "1 to 4096"),
        (settings.Limits(minimum=1e-6), "1e-06 or more"),
        (settings.Limits(maximum=10**9), "1000000000 or less"),
        (settings.Limits(minimum=0, below=1), "0 or more, below 1"),
        (settings.Limits(), ""),
    ],
)
def test_range_in_words(limits, text):
    assert str(limits) == text


TEXTS = [
    "runs/try #2",
    "2024_11_28",
    "007",
    "1e3",
    "no",
    "*.tar",
    "@x",
    "/a: b",
    "%x",
    "null",
    "'a'",
    "[a, b]",
    "a: {b}",
]
TEXTS += ["", " a ", "${steps}", r"a\${b}", "${", r"\\", "x=y", "~", "&a", "!t", "-", "0x1f", "1:30"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_taken_as_given_and_survives_a_file(tmp_path, text):
    loaded = settings.load(Settings, None, [f"name={text}", "section.weight=1e3", "steps=1_0"])
    assert loaded == Settings(steps=10, name=text, section=Section(weight=1000.0))
    (tmp_path / "dumped.yaml").write_text(settings.dump(loaded))
    assert settings.load(Settings, str(tmp_path / "dumped.yaml"), []) == loaded


def test_one_of_several_words_is_not_read_as_yaml(folder):
    assert fails(folder, None, "section.kind=no") == "section.kind=no: section.kind must be a or b"


ALIASES = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("extends: {a: b}", "extends must be the name of a configuration, got {'a': 'b'}"),
        ("extends: 3", "extends must be the name of a configuration, got 3"),
        ("extends: [plain]", "extends must be the name of a configuration"),
        ("steps: " + "9" * 5000, "cannot be read"),
        ("steps: 0x" + "f" * 5000, "steps must be below 2^63, got a number of about 6000 digits"),
        ("section: {weight: 0x" + "f" * 5000 + "}", "section.weight must be a number"),
        ("? 0x" + "f" * 900 + "\n: 1", "unknown setting"),
        ("steps: " + "[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        (ALIASES, "more than 10,000 values"),
        ("a: &a [*a]", "cannot be read"),
        ("steps: ${steps}", "Recursive interpolation"),
        ("name: " + "x" * 10**6, "longer than 262,144 bytes"),
        ("name: [" + "1," * 10**5 + "]", "more than 10,000 values"),
        ('name: "a\\0b"', "name must be text without null characters"),
        ('name: "\\udcff"', "name must be text without null characters and invalid UTF-8"),
        ("name: 2024-13-45", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_yaml_is_one_line(folder, tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    if message is None:
        settings.load(Numbers, str(path), (), folder)
        return
    with pytest.raises(UserError) as caught:
        settings.load(Numbers, str(path), (), folder)
    assert message in str(caught.value)


@dataclass
class Numbers:
    steps: int = setting(1, "Steps, without an upper limit.")
    name: str = setting("", "Name.")
    section: Section = section(Section, "Section.")


def test_a_chain_of_files_ends(folder, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {tmp_path / str(i + 1)}.yaml")
    assert "extended by 32 files" in fails(folder, str(tmp_path / "0.yaml"))


def test_a_configuration_must_be_a_regular_file(folder, tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    assert "not a regular file" in fails(folder, str(tmp_path / "x.yaml"))


def test_a_long_unknown_name_costs_no_time(folder):
    for name, *overrides in (("n" * 10**5,), (None, "n" * 10**5 + "=1")):
        assert "did you mean" in fails(folder, name, *overrides)
