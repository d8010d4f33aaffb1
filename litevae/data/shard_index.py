"""The list of the images in one .tar shard, which is kept on the local disk for remote shards."""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from litevae.data.pixels import EXTENSIONS
from litevae.data.remote import READ_AHEAD, RemoteError, RemoteFile, file_info, is_remote, redact
from litevae.errors import UserError
from litevae.files import make_folder, open_regular, read_json, replacing, write

CACHE = "LITEVAE_CACHE"  # environment variable


@dataclass
class ShardIndex:
    """The images in a shard.

    Attributes:
        names: names of the members.
        locations: per image, offset and size of the image and of its .cls member.
        left_out: number of the members that are left out, by their kind.
    """

    names: list[str] = field(default_factory=list)
    locations: list[list[int]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


def index_shard(path: str, extensions: tuple[str, ...] = EXTENSIONS) -> ShardIndex:
    """Lists the images in a shard, whose headers are read.

    The list of a remote shard is taken from the folder of lists instead, if the shard has not changed since.

    Raises:
        UserError: the shard is missing, corrupt, compressed or truncated, or holds a member twice.
    """
    if not is_remote(path):
        return read_shard(path, path, None, extensions)
    shown = redact(path)
    try:
        size, version = file_info(path)
    except RemoteError as reason:
        raise UserError(f"{shown}: {reason}") from None
    identity = json.dumps([shown, size, version, *([] if extensions == EXTENSIONS else [extensions])])
    kept = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    index = read_index(kept, size) if version else None
    if index is None:
        index = read_shard(shown, path, size, extensions)
        if version:
            keep_index(kept, index)
    return index


def cache_folder() -> Path:
    """Returns the folder for lists of remote shards."""
    base = os.environ.get(CACHE)
    if base:
        return Path(base).expanduser() / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litevae" / "shards"


def keep_index(path: Path, index: ShardIndex) -> None:
    """Writes a list; a line on stderr says that it cannot be kept."""
    try:
        make_folder(path.parent)
        with replacing(path) as temporary:
            write(temporary, json.dumps(asdict(index)).encode())
    except OSError as error:
        reason = f"{path.parent}: the lists of remote shards cannot be kept here: {error.strerror}"
        print(
            f"{reason}; each run reads the shards' headers again ({CACHE} names another folder)",
            file=sys.stderr,
        )


def read_index(path: Path, size: int) -> ShardIndex | None:
    """Reads the list of a shard of `size` bytes; None if there is no valid one."""
    try:
        index = ShardIndex(**read_json(path))
        rows = [(*map(int, row),) for row in index.locations]
        fits = len(rows) == len(index.names) and all(
            len(row) == 4 and min(row) >= 0 and row[0] + row[1] <= size and row[2] + row[3] <= size
            for row in rows
        )
        fits &= all(isinstance(name, str) for name in index.names) and isinstance(index.left_out, dict)
    except (OSError, ValueError, TypeError):
        return None
    return index if fits else None


def read_shard(name: str, path: str, size: int | None, extensions: tuple[str, ...]) -> ShardIndex:
    """Lists the images in a shard by its headers.

    Args:
        name: name of the shard in messages.
        path: path or address.
        size: size in bytes of a remote shard; None for a local one.
        extensions: extensions of images.

    Raises:
        UserError: `index_shard` lists the reasons.
    """
    from webdataset.tariterators import base_plus_ext  # slow to import

    index, left_out = ShardIndex(), Counter[str]()
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in read_members(name, path, size):
        key, ext = base_plus_ext(member.name)
        if not key:  # a hidden file, or one without an extension
            continue
        if not member.isreg() or member.issparse():
            left_out["links or sparse files with an image's name"] += is_image(ext, extensions)
            continue
        sample = samples.setdefault(key, {})
        if ext.lower() in sample:
            raise UserError(f"{name}: holds {member.name!r:.200} twice")
        sample[ext.lower()] = member
    for sample in samples.values():
        images = [ext for ext in sample if is_image(ext, extensions)]
        if not images:
            left_out["samples without an image"] += 1
            continue
        left_out["further images of the same samples"] += len(images) - 1
        image = sample[min(images, key=lambda ext: "." in ext)]
        cls = sample.get("cls")
        label = (cls.offset_data, cls.size) if cls else (0, 0)
        index.names.append(image.name)
        index.locations.append([image.offset_data, image.size, *label])
    index.left_out = dict(left_out)
    return index


def is_image(ext: str, extensions: tuple[str, ...]) -> bool:
    """Returns whether a member with this extension, such as "mask.png", is an image."""
    return f".{ext.lower()}".endswith(extensions)


def read_members(name: str, path: str, size: int | None) -> Iterator[tarfile.TarInfo]:
    """Yields the headers in a .tar file.

    Raises:
        UserError: the file is no uncompressed .tar file, or is truncated or corrupt.
    """
    try:
        with open_shard(path, size) as file:
            with tarfile.open(name, "r:", fileobj=file) as tar:
                yield from tar
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{name}: not a whole .tar file: {error}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    if end.strip(b"\0"):  # tarfile takes an invalid header for the end of the archive
        raise UserError(f"{name}: not a whole .tar file: broken header after {tar.offset} bytes")


def open_shard(path: str, size: int | None) -> IO[bytes]:
    """Opens a local file, or a remote one of `size` bytes."""
    return open_regular(Path(path)) if size is None else io.BufferedReader(RemoteFile(path, size), READ_AHEAD)
