"""Typed settings: dataclasses filled from YAML and `key=value` overrides, with one-line error messages.

Each field of a configuration dataclass is declared with `setting` or `section`, which keep its range and meaning.
"""

import difflib
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litevae.errors import UserError, one_line, shorten
from litevae.files import why_missing
from litevae.typed_yaml import is_text, parse, read

MOST_FILES = 32  # that extend each other
LARGEST = 2**63 - 1  # of a whole number
LONGEST_NAME = 200  # characters of a name that are compared; the time grows with their square

Schema = TypeVar("Schema")
Value = TypeVar("Value")
Keys = Mapping[str, Any]  # maps each dotted key to its type


@dataclass(frozen=True)
class Limits:
    """The range of a number: minimum <= number <= maximum, and number < below. None stands for no limit."""

    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None

    def violation(self, number: float) -> str | None:
        """Returns the limit that a number violates, such as "1 or more", or None.

        NaN violates every limit; infinity violates a minimum too, because no setting may be infinite.
        """
        if self.minimum is not None and not self.minimum <= number < math.inf:
            return f"{self.minimum} or more"
        if self.maximum is not None and not number <= self.maximum:
            return f"{self.maximum} or less"
        if self.below is not None and not number < self.below:
            return f"below {self.below}"
        return None

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:.12g} to {self.maximum:.12g}"
        limits = [] if self.minimum is None else [f"{self.minimum:.12g} or more"]
        limits += [] if self.maximum is None else [f"{self.maximum:.12g} or less"]
        limits += [] if self.below is None else [f"below {self.below:.12g}"]
        return ", ".join(limits)


def setting(
    default: Value,
    meaning: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Value:
    """Declares a setting as a dataclass field.

    Args:
        default: default value. Each instance gets a copy of a list.
        meaning: description in one or two sentences, which `litevae config` prints.
        minimum: smallest allowed number. For lists and tuples, the limits hold for each element.
        maximum: largest allowed number.
        below: upper limit that is not itself allowed.
    """
    metadata = {"meaning": meaning, "limits": Limits(minimum, maximum, below)}
    if isinstance(default, list):
        return cast(Value, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


def section(schema: type[Schema], meaning: str) -> Schema:
    """Declares a section, whose settings are the fields of the dataclass `schema`, as a dataclass field."""
    return field(default_factory=schema, metadata={"meaning": meaning})


def load(schema: type[Schema], name: str | None, overrides: Sequence[str], folder: Path = Path()) -> Schema:
    """Returns the defaults of `schema`, replaced first by the file's settings and then by the overrides.

    A file with `extends: NAME` replaces settings of the configuration NAME.

    Args:
        schema: dataclass with a default for each field. Its sections are dataclasses. Its values are int,
            float, bool, str, Literals of str, lists, tuples, or lists of dataclasses; each of these dataclasses
            has an `example: ClassVar[str]` that shows how to write one.
        name: name of a configuration shipped in `folder`, or a path that ends in .yaml; None for the defaults.
        overrides: settings such as "max_steps=20" or "data.size=64". Text is taken as it is given; every other
            value is in YAML notation, in which text is taken as it is written (see `litevae.typed_yaml.parse`).
        folder: folder that holds the shipped configurations of this schema as NAME.yaml.

    Raises:
        UserError: there is no such configuration, its YAML is broken, a key is unknown (the message names the
            nearest), or a value has the wrong type or is out of range.
    """
    keys = dict(all_keys(schema))
    config = OmegaConf.structured(schema)
    files = [] if name is None else read_files(schema, find_config(name, folder), folder)
    for file, values in reversed(files):
        apply(config, values, keys, f"{file}: ")

    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"{shorten(override)} is not a setting: write key=value, such as max_steps=20")
        if key not in keys:
            raise UserError(unknown_key(key, keys))
        try:
            if is_text(keys[key]):
                set_value(config, key, as_given(text), keys, f"{override}: ")
            else:
                apply(config, {key: parse(text, keys[key])}, keys, f"{override}: ")
        except UserError:
            raise
        except Exception:  # PyYAML lets some errors of int() and float() through
            raise UserError(f"{override}: {key} must be {expected(key, keys)}") from None

    try:
        loaded = cast(Schema, OmegaConf.to_object(config))
    except (
        OmegaConfBaseException,
        RecursionError,
    ) as error:  # an interpolation of an unknown key or of itself
        raise UserError(f"{name or 'settings'}: {one_line(error)}") from None
    check_ranges(loaded)
    return loaded


def shipped(folder: Path) -> list[str]:
    """Returns the names of the configurations in `folder`; its subfolders hold configurations of other kinds."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_config(name: str, folder: Path) -> Path:
    """Returns the file for `name`: a path that ends in .yaml, or the name of a configuration in `folder`."""
    if is_path(name):
        path = Path(name)
        if not os.path.isfile(path):
            raise UserError(f"{name}: {why_missing(path, 'file')}")
        return path
    names = shipped(folder)
    if name not in names:
        raise UserError(unknown_config(name, names))
    return folder / f"{name}.yaml"


def is_path(name: str) -> bool:
    """Returns whether `name` is the path of a YAML file rather than the name of a shipped configuration."""
    return name.endswith((".yaml", ".yml"))


def unknown_config(name: str, names: Sequence[str]) -> str:
    """Returns the message for a configuration that does not exist, with the most similar one that does."""
    nearest = difflib.get_close_matches(name[:LONGEST_NAME], names, n=1, cutoff=0.0)[0]
    return (
        f"no configuration named {shorten(name)}: did you mean {nearest!r}? "
        f"(there are: {', '.join(names)}; or give the path of a .yaml file)"
    )


def read_files(schema: type, path: Path, folder: Path) -> list[tuple[Path, Any]]:
    """Returns the settings of a file for `schema`, then those of the file that it `extends`, and so on."""
    files: list[tuple[Path, Any]] = []
    following: str | None = str(path)
    while following is not None:
        path = find_config(following, folder)
        if path in [file for file, _ in files]:
            raise UserError(f"{path}: extends itself")
        if len(files) == MOST_FILES:
            raise UserError(f"{path}: extended by {MOST_FILES} files, one after the other; no more are read")
        try:
            values = read(path, schema)
            values = {} if values is None else values  # an empty file
            following = values.pop("extends", None) if isinstance(values, dict) else None
        except Exception as error:  # besides its own errors, PyYAML raises those of int(), date() and others
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read: {one_line(reason) or type(error).__name__}") from None
        if not isinstance(following, str | None):
            raise UserError(f"{path}: extends must be the name of a configuration, got {shorten(following)}")
        files.append((path, values))
    return files


def apply(config: DictConfig, values: Any, keys: Keys, where: str) -> None:
    """Sets each of `values` in `config`; a UserError for one that does not fit begins with `where`."""
    if not isinstance(values, dict):
        raise UserError(f"{where}must be a mapping of settings")
    # Keys are set one by one, because OmegaConf's own errors do not always name the key.
    for key, value in leaves(values, keys):
        if key not in keys:
            raise UserError(where + unknown_key(key, keys))
        # YAML reads an empty value as null.
        set_value(config, key, "" if value is None and keys[key] is str else value, keys, where)


def set_value(config: DictConfig, key: str, value: Any, keys: Keys, where: str) -> None:
    """Sets `key` in `config`; a UserError for a value that does not fit begins with `where`."""
    try:
        OmegaConf.update(config, key, value)
    except Exception:  # OmegaConf lets some errors of int() and float() through
        raise UserError(f"{where}{key} must be {expected(key, keys)}") from None


def as_given(text: str) -> str:
    """Escapes the interpolations of OmegaConf in a text, so that it stands for itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def dump(config: Any) -> str:
    """Returns a configuration in the YAML notation that `load` reads."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [escape(each) for each in value]
        return as_given(value) if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(escape(asdict(config))))


def leaves(values: Any, keys: Keys, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values, descending into the sections of the schema."""
    for name, value in values.items():
        key = prefix + (name if isinstance(name, str) else shorten(name))
        if isinstance(value, dict) and is_dataclass(keys.get(key)):
            yield from leaves(value, keys, f"{key}.")
        else:
            yield key, value


def all_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key of a dataclass with its type, sections included."""
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        yield prefix + entry.name, hints[entry.name]
        if is_dataclass(hints[entry.name]):
            yield from all_keys(cast(type, hints[entry.name]), f"{prefix}{entry.name}.")


def unknown_key(key: str, keys: Keys) -> str:
    """Returns the message for a key that does not exist, with the most similar one that does."""

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key[:LONGEST_NAME], candidate).ratio()
        # This finds a correct name whose section is missing or wrong.
        leaf = difflib.SequenceMatcher(
            None, key.split(".")[-1][:LONGEST_NAME], candidate.split(".")[-1]
        ).ratio()
        return max(whole, 0.95 * leaf)

    single = [each for each in keys if not is_dataclass(keys[each])]  # a section itself cannot be set
    return f"unknown setting {shorten(key)}: did you mean {max(single, key=similarity)!r}?"


def expected(key: str, keys: Keys) -> str:
    """Returns a description of the values that `key` takes, for "KEY must be ..."."""
    kind = keys[key]
    if is_dataclass(kind):
        return f"set key by key, such as {key}.{fields(kind)[0].name}=..."
    return describe_type(kind)


def describe_type(kind: Any) -> str:
    """Returns the name of a type for users, such as "a whole number"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return describe_type(args[0])
    if is_dataclass(kind):
        return "with the settings " + ", ".join(entry.name for entry in fields(kind))
    if origin is Literal:
        return " or ".join(args)
    if origin is list:
        example = cast(Any, args[0]).example if is_dataclass(args[0]) else "1,2"
        if choices := typing.get_args(args[0]):  # of a Literal
            example = ",".join(choices[-2:])
        return f"a list such as [{example}], each {describe_type(args[0])}"
    if origin is tuple:
        example = ",".join(("0.5", "0.9", "0.95")[: len(args)])  # rising, for a range
        return f"{len(args)} values such as [{example}], each {describe_type(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Checks each number in a configuration, sections and lists included, against the limits of its field.

    Args:
        config: dataclass whose fields may be declared with `setting`; those without limits may hold anything.
        prefix: key of `config` itself, with a dot at its end, for the message.

    Raises:
        UserError: a number is out of range, a list holds other lists, or a text can be no name of a file.
    """
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if isinstance(value, str):
            check_text(key, value)
        elif is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    check_ranges(item, f"{key}[{index}].")
                elif item is None or isinstance(item, list | tuple | dict):  # OmegaConf lets some through
                    raise UserError(f"{key} must hold single values, got {shorten(list(value))}")
                elif (allowed := violation(entry, item)) is not None:
                    raise UserError(f"{key} must all be {allowed}, got {shorten(list(value))}")
        elif (allowed := violation(entry, value)) is not None:
            raise UserError(f"{key} must be {allowed}, got {shorten(value)}")


def check_text(key: str, text: str) -> None:
    """Raises UserError for null characters, which no path has, and for invalid UTF-8, which no YAML file can record."""
    if re.search("[\0\ud800-\udfff]", text):  # Python reads invalid bytes as surrogates
        raise UserError(f"{key} must be text without null characters and invalid UTF-8, got {shorten(text)}")


def violation(entry: "Field[Any]", value: Any) -> str | None:
    """Returns the limit of a field that its value violates, or None; only numbers have limits."""
    limits = entry.metadata.get("limits")
    if not limits or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) > LARGEST:
        return ", ".join(
            [*([str(limits)] if str(limits) else []), *(["below 2^63"] * (limits.maximum is None))]
        )
    return limits.violation(value)
