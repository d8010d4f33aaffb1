"""Typed settings: a dataclass filled from YAML and `key=value` overrides, with errors of one line."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from litevae.errors import UserError

Schema = TypeVar("Schema")
Keys = Mapping[str, Any]  # dotted key to type


def load(schema: type[Schema], name: str | None, overrides: Sequence[str], folder: Path) -> Schema:
    """The defaults of `schema`, then the file, then the overrides.

    A file with `extends: NAME` replaces settings of the configuration NAME.

    Args:
        schema: a dataclass with a default for each field. Its sections are dataclasses; its values int,
            float, bool, str, Literals of str, lists, tuples, or lists of dataclasses, each of which shows in
            `example: ClassVar[str]` how one is written.
        name: of a configuration shipped in `folder`, or a path that ends in .yaml; None for the defaults.
        overrides: such as "max_steps=20" or "data.size=64", in YAML's notation after the sign.
        folder: holds the shipped configurations of this schema as NAME.yaml.

    Raises:
        UserError: no such configuration, broken YAML, an unknown key (the message names the nearest), or a
            value of the wrong type.
    """
    keys = dict(all_keys(schema))
    config = OmegaConf.structured(schema)
    for file, settings in reversed([] if name is None else read_files(find_config(name, folder), folder)):
        apply(config, settings, keys, f"{file}: ")

    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r} is not a setting: write key=value, such as max_steps=20")
        if key not in keys:
            raise UserError(unknown_key(key, keys))
        try:
            apply(config, OmegaConf.from_dotlist([override]), keys, f"{override}: ")
        except (YAMLError, OmegaConfBaseException):
            raise UserError(f"{override}: {key} must be {expected(key, keys)}") from None

    try:
        return cast(Schema, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation to nowhere
        raise UserError(f"{name or 'settings'}: {one_line(error)}") from None


def shipped(folder: Path) -> list[str]:
    """Names of the configurations in `folder`, not of those in folders below it, which are of other kinds."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_config(name: str, folder: Path) -> Path:
    """The file that `name` means: a path that ends in .yaml, or a configuration shipped in `folder`."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        return path
    names = shipped(folder)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no configuration named {name!r}: did you mean {nearest!r}? "
            f"(there are: {', '.join(names)}; or give the path of a .yaml file)"
        )
    return folder / f"{name}.yaml"


def read_files(path: Path, folder: Path) -> list[tuple[Path, Any]]:
    """The file's settings, then those of the file that it `extends`, and so on."""
    files: list[tuple[Path, Any]] = []
    following: str | None = str(path)
    while following is not None:
        path = find_config(following, folder)
        if path in [file for file, _ in files]:
            raise UserError(f"{path}: extends itself")
        try:
            settings = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
        following = settings.pop("extends", None) if isinstance(settings, DictConfig) else None
        files.append((path, settings))
    return files


def apply(config: DictConfig, settings: Any, keys: Keys, where: str) -> None:
    """Sets each of `settings` in `config`; UserError, beginning with `where`, for one that does not fit."""
    if not isinstance(settings, DictConfig):
        raise UserError(f"{where}must be a mapping of settings")
    # one at a time: OmegaConf's own errors do not always say which key they are about
    for key, value in leaves(OmegaConf.to_container(settings, resolve=False), keys):
        if key not in keys:
            raise UserError(where + unknown_key(key, keys))
        try:
            # YAML takes nothing after the sign for null
            OmegaConf.update(config, key, "" if value is None and keys[key] is str else value)
        except OmegaConfBaseException:
            raise UserError(f"{where}{key} must be {expected(key, keys)}") from None


def leaves(settings: Any, keys: Keys, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, down to where the sections of the schema end."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and is_dataclass(keys.get(key)):
            yield from leaves(value, keys, f"{key}.")
        else:
            yield key, value


def all_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key under a dataclass with its type, sections included."""
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        yield prefix + entry.name, hints[entry.name]
        if is_dataclass(hints[entry.name]):
            yield from all_keys(cast(type, hints[entry.name]), f"{prefix}{entry.name}.")


def unknown_key(key: str, keys: Keys) -> str:
    """The message for a key that does not exist, with the most similar one that does."""

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        # a right name without its section, or in the wrong one
        leaf = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.95 * leaf)

    single = [each for each in keys if not is_dataclass(keys[each])]  # a section cannot be set
    return f"unknown setting {key!r}: did you mean {max(single, key=similarity)!r}?"


def expected(key: str, keys: Keys) -> str:
    """What may stand behind `key=`, in words."""
    kind = keys[key]
    if is_dataclass(kind):
        return f"set key by key, such as {key}.{fields(kind)[0].name}=..."
    return in_words(kind)


def in_words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return in_words(args[0])
    if is_dataclass(kind):
        return "with the settings " + ", ".join(entry.name for entry in fields(kind))
    if origin is Literal:
        return " or ".join(args)
    if origin is list:
        example = cast(Any, args[0]).example if is_dataclass(args[0]) else "1,2"
        return f"a list such as [{example}], each {in_words(args[0])}"
    if origin is tuple:
        return f"{len(args)} values such as [{','.join('0.5' for _ in args)}], each {in_words(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind]


def check_range(config: Any, least: Mapping[str, float], most: Mapping[str, float]) -> None:
    """UserError for a number below its least value, not finite, or above its greatest, by dotted key."""
    for key, minimum in least.items():
        value = setting(config, key)
        if not minimum <= value < float("inf"):
            raise UserError(f"{key} must be {minimum} or more, got {value}")
    for key, maximum in most.items():
        if setting(config, key) > maximum:
            raise UserError(f"{key} must be {maximum} or less, got {setting(config, key)}")


def setting(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
