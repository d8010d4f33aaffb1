"""Images in .tar files of the WebDataset format."""

import io
import os
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from litevae.data.images import decode_image
from litevae.data.paths import PackedStrings, name_files
from litevae.data.pixels import RGB, BadImage, PixelFormat, Pixels, check_label_length
from litevae.data.remote import RemoteError, is_remote, read_part, redact
from litevae.data.shard_index import ShardIndex, index_shard
from litevae.errors import UserError
from litevae.files import open_regular

CONNECTIONS = 16  # remote shards whose headers are read at the same time


class TarShards:
    """The images in .tar files of the WebDataset format, read by their offsets.

    The constructor reads the headers of each shard once, but not the images. A sample consists of the members of a
    shard with the same path up to the first dot, in whichever order they are. Its image is the member with an image's
    extension: x.jpg rather than x.mask.png, and otherwise the first. Samples without an image and all further images
    are left out, and a line on stderr counts them.

    Args:
        files: paths or addresses of the shards, in their order.
        pixel_format: what the images are, which also determines the extensions.

    Raises:
        UserError: a shard is missing, corrupt, compressed or truncated; it holds a member twice, which `webdataset`
            refuses too; or no shard holds an image.
    """

    def __init__(self, files: Sequence[str], pixel_format: PixelFormat = RGB) -> None:
        self.files, self.pixel_format = list(files), pixel_format
        self.shown = [redact(file) if is_remote(file) else file for file in self.files]
        names: list[str] = []
        # per image: number of the shard, then offset and size of the image and of its .cls member
        locations = array("q")
        left_out: Counter[str] = Counter()
        for number, index in enumerate(index_shards(self.files, pixel_format.extensions)):
            names += index.names
            left_out.update(index.left_out)
            for location in index.locations:
                locations.extend((number, *location))
        if not locations:
            raise UserError(f"{name_files(self.shown)}: contains no images")
        counts = [f"{kind} ({count})" for kind, count in left_out.items() if count]
        if counts and os.environ.get("RANK", "0") == "0":  # only the first process prints
            print(f"{name_files(self.shown)}: left out: {', '.join(counts)}", file=sys.stderr)
        self.names = PackedStrings(names)
        self.locations = np.array(locations).reshape(-1, 5)
        self.parent = os.path.commonpath([os.path.dirname(absolute_path(file)) for file in self.shown])

    def __len__(self) -> int:
        return len(self.locations)

    def name(self, index: int) -> str:
        return f"{self.shown[self.locations[index, 0]]}:{self.names[index]}"

    def key(self, index: int) -> str:
        shard = os.path.relpath(absolute_path(self.shown[self.locations[index, 0]]), self.parent)
        return f"{Path(shard).as_posix()}:{self.names[index]}"

    def label(self, index: int) -> str | None:
        number, _, _, offset, size = self.locations[index].tolist()
        check_label_length(size)
        label = self.read(number, offset, size).decode(errors="replace").strip() if size else ""
        return None if label in ("", "-1") else label  # -1 is an unknown class, as in `datasets`

    def load(self, index: int) -> Pixels:
        number, offset, size, *_ = self.locations[index].tolist()
        return decode_image(io.BytesIO(self.read(number, offset, size)), self.pixel_format)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Reads `size` bytes at `offset` of shard `number`; `BadImage` if that fails."""
        try:
            if is_remote(self.files[number]):
                return read_part(self.files[number], offset, size)
            with open_regular(Path(self.files[number])) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        except RemoteError as reason:
            raise BadImage(f"cannot be read: {reason}") from None


def absolute_path(file: str) -> str:
    """Returns the absolute path of a local file, or one that stands for an address."""
    return "/" + file.replace("://", "/") if is_remote(file) else os.path.abspath(file)


def index_shards(files: Sequence[str], extensions: tuple[str, ...]) -> list[ShardIndex]:
    """Lists the images in each shard, in the order of `files`.

    The headers of remote shards are read concurrently. Each process of a run begins with shards of its own, and finds
    those of the others on the same machine in the folder of lists.

    Raises:
        UserError: a shard cannot be used. For remote shards, the message counts and names all that fail.
    """
    if not any(map(is_remote, files)):
        return [index_shard(file, extensions) for file in files]
    rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    order = sorted(range(len(files)), key=lambda number: (number - rank) % processes)
    executor = ThreadPoolExecutor(CONNECTIONS)
    try:
        futures = {number: executor.submit(index_shard, files[number], extensions) for number in order}
        failures = [str(error) for i in range(len(files)) if (error := futures[i].exception()) is not None]
        for number in range(len(files)):
            error = futures[number].exception()
            if error is not None and (len(failures) == 1 or not isinstance(error, UserError)):
                raise error
        if failures:
            raise UserError(f"{len(failures)} of {len(files)} shards cannot be used: {'; '.join(failures)}")
        return [futures[number].result() for number in range(len(files))]
    finally:
        executor.shutdown(cancel_futures=True)
