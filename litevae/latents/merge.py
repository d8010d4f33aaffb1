"""Joining of the folders into which several computers have encoded disjoint ranges of the same images."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from litevae.data.bad_images import BAD_IMAGES, BadImages
from litevae.errors import UserError
from litevae.files import replacing, sync_folder
from litevae.latents.folder import COMMAND
from litevae.latents.index import INDEX, Part, Shard, read_index, write_index
from litevae.latents.shards import find_damage, verify
from litevae.lock import locked

SECTIONS = ("format", "model", "images", "encoding", "latents")  # of index.json; these must agree


def merge_parts(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Joins the folders of all ranges into the folder that contains them, and checks every file.

    The result is the folder that one run would have written. The shards are hard links to those of the ranges, or
    copies where the file system has no links. The ranges' folders stay, and may be deleted.

    Args:
        folders: folders of the ranges, in any order. Files that an earlier call has written beside them are ignored.

    Returns:
        Folder of the result, and the content of its index.json.

    Raises:
        UserError: a range is missing, incomplete, damaged, or given twice; the ranges are of different images, models
            or settings; the folders do not lie in one folder; or that holds other encoded images.
    """
    parts = [folder for folder in folders if not folder.is_file()]
    if not parts:
        raise UserError("--merge: give the folders of all ranges, such as OUT/*")
    target = parts[0].absolute().parent
    if outside := next((folder for folder in parts if folder.absolute().parent != target), None):
        raise UserError(f"{outside}: is not in {target}, as {parts[0]} is")
    indexes = {folder: verify(folder, part=True) for folder in parts}
    header = check_parts(indexes)
    shards = sorted(
        ((shard, folder) for folder, index in indexes.items() for shard in index["shards"]),
        key=lambda pair: pair[0].first,
    )
    with ExitStack() as until_end:
        until_end.enter_context(locked(target, COMMAND))
        existing = read_index(target)
        if existing is not None and any(existing[name] != header[name] for name in SECTIONS):
            raise UserError(f"{target}: holds other encoded images")
        for shard, folder in shards:
            place(folder / shard.file, target, shard)
        sync_folder(target)
        listed = [shard for shard, _ in shards]
        write_index(target, header, listed)
        (target / BAD_IMAGES).unlink(missing_ok=True)
        bad = BadImages(target / BAD_IMAGES, header["images"]["count"], 1)
        bad.add(entry for shard in listed for entry in shard.bad.items())
    return target, {**header, "shards": listed}


def check_parts(indexes: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of index.json of all ranges together, without the shards.

    Raises:
        UserError: the ranges do not make up the whole.
    """
    first, *others = indexes
    for folder in indexes:
        if not indexes[folder].get("part"):
            raise UserError(f"{folder}: holds all images, not a range of them (litevae encode --range)")
    count = indexes[first]["part"].total
    for folder in others:
        if indexes[folder]["part"].total != count:
            raise UserError(f"{folder}: holds range {indexes[folder]['part']}, and {first} one of {count}")
        for name in SECTIONS:
            if indexes[folder][name] != indexes[first][name]:
                raise UserError(f"{folder / INDEX}: {name} is not the same as in {first}")
    found = Counter(index["part"].number for index in indexes.values())
    for kind, numbers in (
        ("are missing", [number for number in range(min(count, 10**6)) if number not in found]),
        ("are given twice", [number for number in found if found[number] > 1]),
    ):
        if numbers:
            names = ", ".join(str(Part(number, count)) for number in numbers[:5])
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            raise UserError(f"{first.parent}: the ranges {names}{more} {kind}")
    return {name: value for name, value in indexes[first].items() if name not in ("part", "shards")}


def place(source: Path, target: Path, shard: Shard) -> None:
    """Links a shard's file into the folder `target`, or copies and checks it."""
    with replacing(target / shard.file) as temporary:
        temporary.unlink()
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # the file system has no hard links
            shutil.copyfile(source, temporary)
    if damage := find_damage(target, shard):
        raise UserError(f"{target / shard.file}: {damage}")
