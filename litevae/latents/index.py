"""index.json of an encoded data set: the list of its shards, written atomically and checked when it is read.

The files that a crashed run or somebody else may have left are not trusted: each entry that is used has its type and
range checked, and no name leads out of the folder.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from litevae.errors import UserError, shorten
from litevae.files import parse_json, read_json, replacing, sync_folder, why_missing, write

FORMAT = "litevae latents, version 1"
BUCKETS_FORMAT = "litevae latents, version 2"  # of latents of several shapes
INDEX = "index.json"
IMAGES = "images"  # entry of a shard's metadata

MAX_FACTOR = 1e30  # of a latent's scale and shift, which are applied in float32


@dataclass(frozen=True)
class Shard:
    """A file of latents, as the index lists it.

    Attributes:
        file: name of the file.
        first: number in the data of the shard's first image.
        images: number of images that the shard covers.
        count: number of images that the file holds.
        bytes: length of the file.
        sha256: SHA-256 of the file, in hexadecimal.
        bad: names of the images that could not be read, with the reasons.
    """

    file: str
    first: int
    images: int
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]


class ImageEntry(NamedTuple):
    """An image of a shard, as the metadata list it."""

    name: str
    label: str | None
    height: int  # of the latent
    width: int


class Part(NamedTuple):
    """One of `total` disjoint ranges of the shards, with the numbers 0 to `total` - 1."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def shards(self, count: int) -> range:
        """Returns the numbers of the range's shards among `count`; the lengths of the ranges differ by at most 1."""
        return range(self.number * count // self.total, (self.number + 1) * count // self.total)


def name_shard(number: int) -> str:
    """Returns the file name of shard `number`."""
    return f"shard-{number:05d}.safetensors"


def marker_path(folder: Path, number: int) -> Path:
    """Returns the path of the completion marker of shard `number`, which exists until the index lists the shard."""
    return folder / f".shard-{number:05d}.json"


def write_index(folder: Path, header: dict[str, Any], shards: Iterable[Shard]) -> None:
    """Writes index.json: `header` and the list of shards, which is empty until all are complete."""
    with replacing(folder / INDEX) as path:
        write(
            path,
            (json.dumps({**header, "shards": [asdict(each) for each in shards]}, indent=1) + "\n").encode(),
        )
    sync_folder(folder)


def read_index(folder: Path) -> dict[str, Any] | None:
    """Reads index.json of a complete or incomplete folder.

    Returns:
        Its content, with `Shard`s in "shards" and for a range of them a `Part` in "part"; None
        if the file does not exist.

    Raises:
        UserError: the file is no index, or is of another version.
    """
    path = folder / INDEX
    try:
        index = read_json(path)
        if not isinstance(index, dict) or "format" not in index:
            raise ValueError("has no format")
        if index["format"] not in (FORMAT, BUCKETS_FORMAT):
            raise UserError(
                f"{path}: is of format {shorten(index['format'])}; this version reads {FORMAT!r} and "
                f"{BUCKETS_FORMAT!r}"
            )
        index["shards"] = check_index(index)
        if "part" in index:
            index["part"] = read_part(index)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not the index of encoded images: {error}") from None
    return index


def check_index(index: dict[str, Any]) -> list[Shard]:
    """Checks the types of all entries of index.json that are used.

    Returns:
        The shards.

    Raises:
        ValueError: an entry is missing or of the wrong type. The message names it.
    """
    for section in ("model", "images", "encoding", "latents"):
        if not isinstance(index.get(section), dict):
            raise ValueError(f"{section} must be a mapping, got {shorten(index.get(section))}")
    latents, encoding = index["latents"], index["encoding"]
    shape = latents.get("shape")
    shapes = (is_shape, "three whole numbers from 1, the first even")
    if index["format"] == BUCKETS_FORMAT:
        shapes = (is_open_shape, "an even number from 2 and twice null")
    for name, value, fits, allowed in (
        ("complete", index.get("complete"), is_bool, "true or false"),
        ("model.sha256", index["model"].get("sha256"), is_text, "text"),
        ("images.count", index["images"].get("count"), is_count, "a whole number"),
        ("encoding.mirror", encoding.get("mirror"), is_bool, "true or false"),
        ("latents.shape", shape, *shapes),
        ("latents.scaling_factor", latents.get("scaling_factor"), is_factor, "a number other than 0"),
        ("latents.shift_factor", latents.get("shift_factor"), is_optional_number, "a number or null"),
        ("shards", index.get("shards"), is_list, "a list"),
    ):
        if not fits(value):
            raise ValueError(f"{name} must be {allowed}, got {shorten(value)}")
    part, first = read_part(index), 0
    if part is not None:
        first = part.shards(-(-index["images"]["count"] // encoding["shard_size"])).start
    return [parse_shard(entry, number) for number, entry in enumerate(index["shards"], first)]


def read_part(index: dict[str, Any]) -> Part | None:
    """Returns the range of the shards that index.json covers, or None if it covers all.

    Raises:
        ValueError: the entry is of the wrong type.
    """
    value = index.get("part")
    if value is None:
        return None
    if not is_list(value) or len(value) != 2 or not all(map(is_count, value)) or value[0] >= value[1]:
        raise ValueError(f"part must be two whole numbers, the first below the second, got {shorten(value)}")
    size = index["encoding"].get("shard_size")
    if not is_count(size) or size == 0:
        raise ValueError(f"encoding.shard_size must be a whole number from 1, got {shorten(size)}")
    return Part(*value)


def parse_shard(entry: Any, number: int) -> Shard:
    """Returns shard `number` as JSON holds it; `ValueError` if its entries are not of the right types."""
    try:
        shard = Shard(**entry)
    except TypeError:
        raise ValueError(f"shard {number} must have the entries of a shard, got {shorten(entry)}") from None
    if shard.file != name_shard(number):  # any other name might lead out of the folder
        raise ValueError(f"shard {number} must be {name_shard(number)}, got {shorten(shard.file)}")
    for name in ("first", "images", "count", "bytes"):
        if not is_count(getattr(shard, name)):
            raise ValueError(f"{name} of shard {number} must be a whole number, got {shorten(entry[name])}")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(
            f"sha256 of shard {number} must be 64 hexadecimal digits, got {shorten(shard.sha256)}"
        )
    if not isinstance(shard.bad, dict) or not all(map(is_text, (*shard.bad, *shard.bad.values()))):
        raise ValueError(f"bad of shard {number} must map names to reasons, got {shorten(shard.bad)}")
    return shard


def read_images(file: Any, shape: Sequence[int | None]) -> list[ImageEntry]:
    """Returns the images that the metadata of an open shard list.

    Args:
        file: shard that `safe_open` has opened.
        shape: shape of the folder's latents in index.json.

    Raises:
        ValueError: the metadata list no images, or not as the folder's format has them.
    """
    text = (file.metadata() or {}).get(IMAGES)
    listed = None if text is None else parse_json(text.encode())
    if not isinstance(listed, list):
        raise ValueError(f"{IMAGES} must be a list, got {shorten(listed)}")
    side = list(shape[1:])
    sizes = side == [None, None]
    allowed = "a name, a label or null, and two whole numbers" if sizes else "a name and a label or null"
    for entry in listed:
        if not (
            isinstance(entry, list)
            and len(entry) == (4 if sizes else 2)
            and is_text(entry[0])
            and (entry[1] is None or is_text(entry[1]))
            and all(is_count(length) and 0 < length < 2**31 for length in entry[2:])
        ):
            raise ValueError(f"each of {IMAGES} must be {allowed}, got {shorten(entry)}")
    return [ImageEntry(*entry) if sizes else ImageEntry(*entry, *side) for entry in listed]


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def is_count(value: Any) -> bool:
    """Returns whether a value is a whole number that a 64-bit integer holds, and not a bool."""
    return type(value) is int and 0 <= value < 2**63


def is_optional_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= MAX_FACTOR)


def is_factor(value: Any) -> bool:
    return value is not None and is_optional_number(value) and value != 0


def is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not all(map(is_count, value)):
        return False
    return min(value) > 0 and value[0] % 2 == 0


def is_open_shape(value: Any) -> bool:
    return isinstance(value, list) and value[1:] == [None, None] and is_shape([value[0], 1, 1])


def is_text(value: Any) -> bool:
    """Returns whether a value is text that can be written as a file name, if need be of invalid UTF-8."""
    try:
        return isinstance(value, str) and bool(os.fsencode(value) + b"x")
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def read_complete_index(folder: Path, part: bool = False) -> dict[str, Any]:
    """Reads index.json as `read_index` does.

    Args:
        folder: folder of the encoded data set.
        part: whether the folder may hold a range of the shards only.

    Raises:
        UserError: the folder is not complete, or holds a range that it may not.
    """
    index = read_index(folder)
    if index is None:
        reason = "has no index.json: not encoded images"
        raise UserError(f"{folder}: {reason if folder.is_dir() else why_missing(folder, 'folder')}")
    if not index["complete"]:
        raise UserError(f"{folder}: not complete: run the same litevae encode command again to continue it")
    if index.get("part") and not part:
        raise UserError(
            f"{folder}: holds range {index['part']} only: join the ranges with litevae encode --merge"
        )
    return index


def read_marker(folder: Path, number: int) -> Shard | None:
    """Reads the completion marker of a shard; None if there is no valid one."""
    try:
        return parse_shard(read_json(marker_path(folder, number)), number)
    except (OSError, ValueError):
        return None
