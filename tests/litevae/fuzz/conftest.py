"""A runner for generated input, and a generator of broken documents.

Whatever is in a file or a setting, a command ends in success or in one line with exit status 2, in time, within the
memory, and without writing outside its folder.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.configuration
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litevae.cli import main
from litevae.errors import UserError

SECONDS, PATIENCE = 10, 60  # of the processor, and of a clock, because other processes may be busy
MEMORY = 2**30  # bytes
LONGEST = 450  # characters of an error, with "litevae: error: "
LONG = 75  # seconds of each test with -m slow

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod", "chown", "utime")
CHANGING = {f"os.{name}" for name in CHANGES}
RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen"}


class Watch:
    """Records what is written outside of `folder`, and programs that are started, while `folder` is set."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.violations: list[str] = []
        sys.addaudithook(self.hook)  # for good: Python cannot remove it

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        paths: tuple[object, ...] = ()
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            paths = arguments[:1]
        elif event in CHANGING:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
            paths = arguments[1:2] if event == "os.symlink" else paths
        elif event in RUNNING:
            self.violations.append(f"{event} {arguments}")
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self.is_allowed(path):
                self.violations.append(f"{event} {path!r}")

    def is_allowed(self, path: "str | bytes | os.PathLike[str]") -> bool:
        whole = os.path.realpath(os.fsdecode(path))
        return whole == os.devnull or Path(whole).is_relative_to(self.folder)


WATCH = Watch()


@pytest.fixture
def ends_well(capsys, tmp_path, monkeypatch):
    """A function that calls another, which may return or raise UserError, and nothing else that is visible.

    It returns the message of the error, or None.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # modules that are imported late

    def give_up(*_):
        raise TimeoutError(f"it takes more than {PATIENCE} seconds")

    def run(function, *arguments):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, before = time.process_time(), signal.signal(signal.SIGALRM, give_up)
        signal.alarm(PATIENCE)
        WATCH.violations, WATCH.folder = [], tmp_path.resolve()
        message = None
        try:
            function(*arguments)
        except UserError as error:
            message = str(error)
        finally:
            WATCH.folder = None
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            capsys.readouterr()
        assert not WATCH.violations
        assert time.process_time() - start < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY >> 10  # in KiB
        assert message is None or (len(message.splitlines()) == 1 and len(message) < LONGEST)
        return message

    return run


@pytest.fixture
def command(capsys, ends_well):
    """A function that runs a command, which ends in success or in one line with exit status 2."""

    def run(*arguments):
        def call():
            capsys.readouterr()
            status = main([str(argument) for argument in arguments])
            errors = capsys.readouterr().err
            if status:
                lines = [line for line in errors.splitlines() if line.startswith("litevae: error: ")]
                assert (status, len(lines)) == (2, 1), errors
                assert errors.endswith(lines[0] + "\n"), errors
                raise UserError(lines[0])

        return ends_well(call)

    return run


@pytest.fixture
def explore(tmp_path_factory):
    """A function that calls a check with many drawn values: the same in each run, or others for `LONG` seconds."""
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))

    def run(strategy: st.SearchStrategy, check: Callable, examples: int, long: bool) -> None:
        chosen = settings(
            max_examples=200 if long else examples,
            derandomize=not long,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        end = time.monotonic() + LONG
        chosen(given(strategy)(check))()
        while long and time.monotonic() < end:
            chosen(given(strategy)(check))()

    return run


SPECIAL_TEXT = (
    *("", "/dev/zero", "/dev/stdin", "../../x", "/etc/passwd", ".", ".."),
    *("\0", "a\0b", "\ud800", "\udcff", "a\nb", "\x1b[2J", "\u2028"),
    *("${x}", "${oc.env:HOME}", "${", "???", "null", "~", "1e400"),
    *("9" * 5000, "é" * 3000, "x-{000..999999999}.tar", "{" * 3000),
)
SPECIAL_NUMBERS = (
    *(-1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**4000)),
    *(1e-300, 1e300, float("nan"), float("inf")),
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(SPECIAL_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(SPECIAL_TEXT),
    st.text(st.characters(codec=None), max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=10), inner, max_size=5)
    ),
    max_leaves=10,
)


def nest(value: object, depth: int, as_list: bool) -> object:
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


SMALL = st.sampled_from((None, True, 0, 1, -1, 1.5, "x"))  # a large document of these has at most a megabyte
LARGE = st.one_of(
    st.builds(nest, SMALL, st.sampled_from((20, 40, 300)), st.booleans()),
    st.builds(lambda value, count: [value] * count, SMALL, st.sampled_from((17, 1000, 50_000))),
    st.builds(
        lambda value, count: {f"k{i}": value for i in range(count)}, SMALL, st.sampled_from((17, 5000))
    ),
)


def places(document: object, path: tuple = ()) -> list[tuple]:
    """Returns the path of each value within a document of mappings and lists."""
    found = [path]
    if isinstance(document, dict | list):
        pairs = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in pairs:
            found += places(value, (*path, key))
    return found


def change(document: object, path: tuple, how: str, value: object) -> object:
    """Returns a copy of a document with the value at `path` replaced or removed, or with a neighbour added."""
    if not path:
        return value if how == "replace" else document
    copied = dict(document) if isinstance(document, dict) else list(document)
    key, *rest = path
    if rest:
        copied[key] = change(copied[key], tuple(rest), how, value)
    elif how == "replace":
        copied[key] = value
    elif how == "remove":
        del copied[key]
    elif isinstance(copied, dict):
        copied[f"{key}_"] = value
    else:
        copied.insert(key, value)
    return copied


@st.composite
def broken(draw, document):
    """Draws a document with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        how = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        document = change(document, path, how, draw(st.one_of(VALUES, VALUES, LARGE)))
    return document


def dump(document: object) -> bytes:
    return json.dumps(document).encode()


@st.composite
def broken_bytes(draw, document, dump):
    """Draws the bytes of a broken document, of which a part may be missing or replaced."""
    content = dump(draw(broken(document)))
    if draw(st.integers(0, 4)):
        return content
    start = draw(st.integers(0, len(content)))
    return content[:start] + draw(st.binary(max_size=5)) + content[start + draw(st.integers(0, 50)) :]


@pytest.fixture
def broken_json():
    """A strategy of the bytes of broken JSON, made of a valid document."""
    return lambda document: broken_bytes(document, dump)


@pytest.fixture
def broken_yaml():
    """A strategy of the bytes of broken YAML, which is a superset of JSON."""

    def dump_yaml(document: object) -> bytes:
        return json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")

    return lambda document: st.one_of(broken_bytes(document, dump), broken_bytes(document, dump_yaml))


@pytest.fixture
def texts():
    """A strategy of single values in the notation of the command line."""
    return st.one_of(st.sampled_from(SPECIAL_TEXT), st.text(), VALUES.map(lambda value: dump(value).decode()))
