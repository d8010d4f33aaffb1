import os

import pytest

import litevae.cli
from litevae.errors import LONGEST_MESSAGE, NonFiniteError, UserError, describe_os_error, shorten


@pytest.mark.parametrize(("error", "status"), [(UserError, 2), (NonFiniteError, 1), (OSError, 1)])
def test_command_line_shows_the_error_as_one_line(monkeypatch, capsys, error, status):
    def fail(**_):
        raise error("what is\nwrong")

    monkeypatch.setattr(litevae.cli, "app", fail)
    assert litevae.cli.main([]) == status
    assert capsys.readouterr().err == "litevae: error: what is wrong\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(**_):
        raise ValueError("a bug")

    monkeypatch.setattr(litevae.cli, "app", fail)
    with pytest.raises(ValueError, match="a bug"):
        litevae.cli.main([])


@pytest.mark.parametrize("value", ["v" * 5000, "a\nb\u2028c", "\x1b[2J", "\ud800", ""])
def test_a_message_is_short_printable_and_keeps_both_ends(value):
    message = str(UserError(f"x.yaml: size {value} must be one of: a, b"))
    assert message.startswith("x.yaml: size ")
    assert message.endswith("must be one of: a, b")
    assert len(message) <= LONGEST_MESSAGE
    assert message.isprintable()


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**400), [1] * 5000, "v" * 5000, {"k": ["v"] * 999}],
    ids=["huge", "negative", "list", "text", "mapping"],  # pytest cannot print the first
)
def test_a_value_in_a_message_is_short(value):
    assert len(shorten(value)) <= 80
    assert shorten([1, "a"]) == "[1, 'a']"


@pytest.mark.parametrize("arguments", [["v" * 9000], ["train", "v" * 9000], ["info", "v" * 9000]])
def test_long_arguments_give_short_messages(capsys, arguments):
    assert litevae.cli.main(arguments) == 2
    assert len(capsys.readouterr().err) < LONGEST_MESSAGE + 50


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you tried to allocate 4096 bytes.")])
def test_a_lack_of_memory_is_a_line(monkeypatch, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(litevae.cli, "app", fail)
    assert litevae.cli.main([]) == 2
    assert capsys.readouterr().err.startswith("litevae: error: out of memory: asked for ")


def test_an_error_of_the_system_names_the_path_and_the_reason(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("n" * 5000), "File name too long"),
        (os.fsencode(tmp_path / "none\udcff"), "No such file or directory"),
    ):
        with pytest.raises(OSError, match=reason) as caught:
            os.stat(path)
        message = describe_os_error(caught.value)
        assert message.startswith(str(tmp_path))
        assert message.endswith(f": {reason}")
        assert len(message) < 250
    assert describe_os_error(OSError("checkpoint x: cannot be written")) == "checkpoint x: cannot be written"
