import re
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from omegaconf import OmegaConf

from litevae import settings, typed_yaml
from litevae.errors import UserError

PLAIN = [
    "2024_11_28",
    "007",
    "1e3",
    "no",
    "Yes",
    "on",
    "true",
    "0x1f",
    "0b1",
    "1:30",
    "1:30.5",
    "1_0",
    "-.inf",
]
PLAIN += [
    ".NaN",
    ".5",
    "1.",
    "2024-01-01",
    "=",
    "<<",
    "+1",
    "-0",
    "1" * 5000,
    "a b",
    "runs/try #2",
    "10 # ten",
]


@dataclass
class Part:
    name: str = ""
    count: float = 0
    words: list[str] = field(default_factory=list)


@dataclass
class Section:
    name: str = ""
    choice: Literal["no", "007", "a"] = "a"
    part: Part = field(default_factory=Part)


@dataclass
class Settings:
    name: str = ""
    optional: str | None = "x"
    flag: bool = False
    count: float = 0
    words: list[str] = field(default_factory=list)
    pair: tuple[str, str] = ("", "")
    named: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    section: Section = field(default_factory=Section)
    parts: list[Part] = field(default_factory=list)


DOCUMENT = """
name: {0}
optional: {0}
words:
  - {0}
  - a
pair:
- {0}
- b
named:
  a: {0}
section.part.name: {0}
section:
  name: {0}
  part:
    words:
    - {0}
parts:
- name: {0}
- words:
  - {0}
"""


def load(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    return settings.load(Settings, str(tmp_path / "x.yaml"), ())


@pytest.mark.parametrize("text", PLAIN, ids=lambda text: text[:12])
def test_text_in_a_file_is_taken_as_it_is_written(tmp_path, text):
    document = DOCUMENT.format(text)
    found = typed_yaml.parse(document, Settings)
    expected = yaml.load(document, Loader=yaml.BaseLoader)  # This loader leaves all scalars as they are.
    assert found == expected
    assert expected["words"][0] == text.partition(" #")[0]
    (tmp_path / "base.yaml").write_text(document)
    loaded = load(tmp_path, f"extends: {tmp_path / 'base.yaml'}\\ncount: 1".replace("\\n", "\n"))
    written = expected["name"]
    assert (loaded.name, loaded.optional, loaded.pair, loaded.words) == (
        *(written, written),
        *((written, "b"), [written, "a"]),
    )
    part = Part(written, 0, [written])
    assert loaded.section == Section(written, "a", part)
    assert (loaded.parts, loaded.named) == ([Part(written), Part(words=[written])], {"a": written})


def test_values_of_other_types_are_read_as_omegaconf_reads_them():
    document = "\n".join(
        f"a{i}: {text}" for i, text in enumerate(PLAIN) if len(text) < 100 and text not in ("=", "<<")
    )
    found = typed_yaml.parse(document, None)
    expected = OmegaConf.to_container(OmegaConf.create(document))
    assert repr(found) == repr(expected)  # with NaN


def test_text_and_other_values_may_stand_side_by_side(tmp_path):
    document = (
        "flag: yes\ncount: 1e3\nnumbers: [0x10, 1_0]\nparts: [{name: 1e3, count: 1e3}]\nsection: {choice: no}"
    )
    loaded = load(tmp_path, document)
    assert (loaded.flag, loaded.count, loaded.numbers) == (True, 1000.0, [16, 10])
    assert (loaded.parts, loaded.section.choice) == ([Part("1e3", 1000.0)], "no")
    # an alias may stand for both
    loaded = load(tmp_path, "count: &x 1e3\nname: *x\nwords: &w [007, *x]\nparts: [{words: *w}]")
    assert (loaded.count, loaded.name, loaded.words) == (1000.0, "1e3", ["007", "1e3"])
    assert loaded.parts == [Part(words=["007", "1e3"])]
    loaded = load(
        tmp_path, "parts: [&p {name: 007, count: 1}, {<<: *p, count: 2}, {<<: [*p, {words: [no]}]}]"
    )
    assert loaded.parts == [Part("007", 1), Part("007", 2), Part("007", 1, ["no"])]


def test_null_quotes_and_nothing_keep_their_meaning(tmp_path):
    loaded = load(tmp_path, "name:\noptional: ~\nwords: ['007', \"a\\tb\", no]")
    assert (loaded.name, loaded.optional, loaded.words) == ("", None, ["007", "a\tb", "no"])
    assert load(tmp_path, "") == load(tmp_path, "# nothing") == Settings()


def test_lists_of_text_on_the_command_line():
    loaded = settings.load(Settings, None, ["words=[007, no, 1e3]", "parts=[{name: 007}]", "numbers=[007]"])
    assert (loaded.words, loaded.parts, loaded.numbers) == (["007", "no", "1e3"], [Part("007")], [7])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: found duplicate key a"),
        ("words: [{a: 1, a: 2}]", "line 1: found duplicate key a"),
        ("words: &w [*w]", "the list or mapping &w contains itself"),
        ("named: {a: &n {b: *n}}", "the list or mapping &n contains itself"),
        ("count: " + "1" * 5000, f"has a whole number of more than {sys.get_int_max_str_digits():,} digits"),
        ("a: [1", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a: !!python/name:os.system", "line 1: could not determine a constructor for the tag"),
        ("a: 1\n--- \nb: 2", "line 2: but found another document"),
        ("a: \0", "special characters are not allowed"),
        ("<<: 3", "line 1: expected a mapping or list of mappings for merging"),
        ("? [1, 2]\n: {[]: 1, {}: 2}", "line 1: found unhashable key"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_yaml_is_refused_with_the_line(tmp_path, document, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        typed_yaml.parse(document, Settings)
    with pytest.raises(UserError) as caught:
        load(tmp_path, document)
    assert "x.yaml: cannot be read: " in str(caught.value)
