"""Bounded reading of YAML in which a plain scalar is text wherever its setting is of type text."""

import re
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml  # type: ignore[import-untyped]

from litevae.files import explaining_digits, open_regular

LONGEST_YAML = 2**18  # bytes
MOST_YAML_NODES = 10**4  # with every alias replaced by what it stands for
DEEPEST_YAML = 32  # nested lists and mappings

TAG = "tag:yaml.org,2002:"
# Types that YAML gives to plain scalars by how they are spelled. Null stays null, as the lack of a value.
SPELLED = {TAG + name for name in ("bool", "int", "float", "value", "merge")}


class Loader(yaml.SafeLoader):
    """YAML 1.1 as OmegaConf reads it: 1e3 is a number, a date is text, and a key must not occur twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in (TAG + "float", TAG + "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        with explaining_digits():
            return super().construct_yaml_int(node)


Loader.add_constructor(TAG + "int", Loader.construct_yaml_int)
# This expression is OmegaConf's.
Loader.add_implicit_resolver(
    TAG + "float",
    re.compile(
        r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def read(path: Path, kind: Any) -> Any:
    """Reads a YAML file of limited length as `parse` reads a document.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is not a regular file.
        ValueError: it is too long, or `parse` raises it. The message is the reason.
    """
    with open_regular(path) as file:
        content = file.read(LONGEST_YAML + 1)
    if len(content) > LONGEST_YAML:
        raise ValueError(f"longer than {LONGEST_YAML:,} bytes")
    return parse(content.decode("utf-8"), kind)


def parse(text: str, kind: Any) -> Any:
    """Returns the value of a YAML document, in which text is taken as it is written.

    Where `kind` or a part of it is text, a plain scalar such as 2024_11_28, 007, 1e3 or no is text as well. A comment,
    quotes, and null or nothing at all keep their meaning.

    Args:
        text: YAML document.
        kind: type of the value: a dataclass with a field per key, which may be dotted, or the type of a field; None if
            it is unknown.

    Raises:
        ValueError: the text is no YAML, or exceeds a limit. The message is the reason.
    """
    try:
        check_extent(text)
        loader = Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(as_declared(node, kind))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def check_extent(text: str) -> None:
    """Checks how much a YAML document contains, before anything is built of it.

    A few aliases of aliases stand for billions of nodes, and deep nesting exhausts Python's stack.

    Raises:
        yaml.YAMLError: the text is no YAML.
        ValueError: it has more nodes or is nested deeper than allowed. The message is the reason.
    """
    counts = [0]  # nodes in each open list or mapping
    names: list[str | None] = []  # anchor of each open list or mapping
    anchors: dict[str | None, int] = {}  # nodes that each anchor stands for
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            count = counts.pop()
            anchors[names.pop()] = count
            counts[-1] += count
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise ValueError(f"the list or mapping &{event.anchor} contains itself")
            counts[-1] += anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchors[event.anchor] = 1
            counts[-1] += 1
        if len(counts) > DEEPEST_YAML:
            raise ValueError(f"nested more than {DEEPEST_YAML} deep")
        if counts[-1] > MOST_YAML_NODES:
            raise ValueError(f"has more than {MOST_YAML_NODES:,} values")


def as_declared(node: yaml.Node, kind: Any) -> yaml.Node:
    """Returns a node in which the scalars that stand for text are text.

    An alias may stand for values of several types, so nodes are copied, not changed.

    Args:
        node: node of a YAML document.
        kind: type of its value, or None if unknown.

    Raises:
        yaml.YAMLError: a mapping has a key twice.
    """
    if isinstance(node, yaml.ScalarNode):
        if not is_text(kind) or node.tag not in SPELLED:
            return node
        return yaml.ScalarNode(TAG + "str", node.value, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        elements: list[Any] = [as_declared(each, element_type(kind)) for each in node.value]
    else:
        elements = []
        names: set[str] = set()
        for key, value in node.value:
            # The value of a merge key is a mapping, or a list of several, whose entries this one takes over.
            merged = key.tag == TAG + "merge"
            if isinstance(key, yaml.ScalarNode) and not merged:
                if key.value in names:
                    raise yaml.MarkedYAMLError(
                        problem=f"found duplicate key {key.value}", problem_mark=key.start_mark
                    )
                names.add(key.value)
            inner = kind if merged else field_type(kind, key.value)
            if merged and isinstance(value, yaml.SequenceNode):
                inner = list[kind]
            elements.append((key, as_declared(value, inner)))
    return type(node)(node.tag, elements, node.start_mark, node.end_mark)


def element_type(kind: Any) -> Any:
    """Returns the type of the elements of a list or tuple type; None if `kind` is another type."""
    kind = without_none(kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) in (list, tuple) else None


def field_type(kind: Any, key: Any) -> Any:
    """Returns the type that a dataclass or mapping type has for a key, which may be dotted; None if it has none."""
    for name in str(key).split("."):
        kind = without_none(kind)
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            kind = typing.get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def without_none(kind: Any) -> Any:
    """Returns T for the type T | None, and any other type itself."""
    args = typing.get_args(kind)
    return args[0] if type(None) in args else kind


def is_text(kind: Any) -> bool:
    """Returns whether the values of a type are text that may be given without quotes."""
    kind = without_none(kind)
    return kind is str or typing.get_origin(kind) is Literal
