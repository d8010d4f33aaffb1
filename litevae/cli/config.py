"""`litevae config`."""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import fill, wrap
from typing import Annotated, Any, Literal, cast

import typer

from litevae import settings
from litevae.errors import UserError

WIDTH = 110
# Widths of the table's columns. With two spaces before each, they add up to WIDTH.
COLUMNS = {"setting": 26, "value": 21, "allowed": 20, "meaning": 35}


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A shipped configuration or a .yaml file; without it, list them."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the configuration."),
    ] = None,
    diffusion: Annotated[
        bool,
        typer.Option(
            "--diffusion",
            help="Use the configurations of litevae train-diffusion; needed for its .yaml files.",
        ),
    ] = False,
) -> None:
    """List the configurations, or show every setting of one.

    \b
    Example: litevae config
             litevae config demo
             litevae config imagenet-b model.latent_channels=12 data.train=FOLDER
             litevae config runs/diffusion-small/config.yaml --diffusion

    For each setting, the table shows the value after NAME and the KEY=VALUE arguments, the default where it
    differs, the values that are allowed, and the meaning. On the command line, the name of a section precedes
    the setting, as in data.size=64.
    """
    commands = list_commands()[1:] if diffusion else list_commands()
    if name is None:
        print("\n\n".join(list_configurations(command) for command in commands))
        return
    command = next((each for each in commands if name in settings.shipped(each.folder)), commands[0])
    if not settings.is_path(name) and name not in (names := all_names(commands)):
        raise UserError(settings.unknown_config(name, names))
    chosen: Any = settings.load(command.schema, name, overrides or (), command.folder)
    summary = describe_file(settings.find_config(name, command.folder))
    print(fill(f"litevae {command.name} {name}" + (f": {summary}" if summary else ""), WIDTH))
    print()
    print("\n".join(settings_table(chosen)))
    try:
        command.check(chosen)
    except UserError as error:
        print("\n" + fill(f"litevae {command.name} would refuse these settings: {error}", WIDTH))


@dataclass(frozen=True)
class Command:
    """A command that takes configurations: its name, what it does, and where and of which type they are.

    `check` raises a UserError for settings that do not fit together.
    """

    name: str
    summary: str
    schema: type
    folder: Path
    check: Callable[[Any], None]


def list_commands() -> list[Command]:
    """Returns `litevae train` and `litevae train-diffusion`."""
    from litevae.diffusion.config import FOLDER, DiffusionConfig, check_diffusion_config
    from litevae.training.build import check_run
    from litevae.training.config import CONFIGS, Config

    return [
        Command("train", "autoencoders", Config, CONFIGS, check_run),
        Command("train-diffusion", "diffusion models", DiffusionConfig, FOLDER, check_diffusion_config),
    ]


def all_names(commands: list[Command]) -> list[str]:
    return [name for command in commands for name in settings.shipped(command.folder)]


def list_configurations(command: Command) -> str:
    """Returns a heading, and the name and summary of each configuration of a command."""
    names = settings.shipped(command.folder)
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {describe_file(command.folder / f'{name}.yaml')}" for name in names]
    wrapped = [fill(line, WIDTH, subsequent_indent=" " * (width + 4)) for line in lines]
    return "\n".join([f"litevae {command.name} NAME ({command.summary}):", *wrapped])


def describe_file(path: Path) -> str:
    """Returns the comment in the first line of a YAML file, or nothing if there is none."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def settings_table(chosen: Any) -> Iterator[str]:
    """Yields the lines of a table of every setting in a configuration, section by section."""
    yield from table_row([[name] for name in COLUMNS])
    for key, meaning, section, default in sections(chosen, type(chosen)()):
        if key:
            yield ""
            yield f"{key}: {meaning}"
        hints = typing.get_type_hints(type(section))
        for entry in fields(section):
            value = getattr(section, entry.name)
            if not is_dataclass(value):
                cells = [entry.name], shown(value, getattr(default, entry.name))
                allowed = allowed_values(hints[entry.name], entry.metadata["limits"])
                yield from table_row([*cells, [allowed], [entry.metadata["meaning"]]])


def sections(
    section: Any, default: Any, key: str = "", meaning: str = ""
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields the key, meaning, settings and default settings of a section and of those in it.

    An entry of a list of sections is a section too; an empty list is represented by an entry of defaults.
    """
    yield key, meaning, section, default
    hints = typing.get_type_hints(type(section))
    for entry in fields(section):
        value, about = getattr(section, entry.name), entry.metadata["meaning"]
        name = f"{key}.{entry.name}" if key else entry.name
        if is_dataclass(value):
            yield from sections(value, getattr(default, entry.name), name, about)
        elif isinstance(value, list) and is_dataclass(schema := typing.get_args(hints[entry.name])[0]):
            names = [f"{name}[{index}]" for index in range(len(value))] or [f"{name}[0], if given"]
            for each, item in zip(names, value or [cast(type, schema)()], strict=True):
                yield from sections(item, type(item)(), each, about)


def shown(value: Any, default: Any) -> list[str]:
    """Returns the paragraphs of a value's cell."""
    return [as_yaml(value)] + ([] if value == default else [f"(default {as_yaml(default)})"])


def as_yaml(value: Any) -> str:
    """Returns a value as it is written in YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    if is_dataclass(value):
        entries = (f"{each.name}: {as_yaml(getattr(value, each.name))}" for each in fields(value))
        return f"{{{', '.join(entries)}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def allowed_values(kind: Any, limits: settings.Limits) -> str:
    """Returns the range or the choices of a setting.

    Args:
        kind: type of the setting.
        limits: range of the setting, if it is a number or consists of numbers.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return f"{allowed_values(args[0], limits)}; or null"
    if origin is Literal:
        return " or ".join(args)
    if origin is tuple:
        return f"{len(args)} values, each {allowed_values(args[0], limits)}"
    if is_dataclass(args[0] if args else None):
        return "list of sections"
    if origin is list:
        return f"list, each {allowed_values(args[0], limits)}"
    return str(limits) or settings.describe_type(kind)


def table_row(cells: list[list[str]]) -> Iterator[str]:
    """Yields the lines of one row.

    Args:
        cells: paragraphs of each cell, which are wrapped to the width of its column.
    """
    wrapped = [
        [line for paragraph in cell for line in wrap(paragraph, width)]
        for cell, width in zip(cells, COLUMNS.values(), strict=True)
    ]
    for line in zip_longest(*wrapped, fillvalue=""):
        padded = (f"{text:{width}}" for text, width in zip(line, COLUMNS.values(), strict=True))
        yield ("  " + "  ".join(padded)).rstrip()
