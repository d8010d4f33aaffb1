"""Images in .tar files of the WebDataset format."""

import io
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from litevae.data.images import EXTENSIONS, BadImage, Pixels, decode_image
from litevae.data.paths import PackedStrings, name_files
from litevae.errors import UserError
from litevae.files import open_regular


class TarShards:
    """The images in .tar files of the WebDataset format, read by their offsets.

    The constructor reads the headers of each shard once, but not the images. As in `webdataset`, a sample consists
    of consecutive members with the same path up to the first dot. Its image is the member with an image's
    extension: x.jpg rather than x.mask.png, and otherwise the first. Samples without an image are skipped.

    Args:
        files: paths of the shards, in their order.

    Raises:
        UserError: a shard is missing, corrupt, compressed or truncated, or no shard holds an image.
    """

    def __init__(self, files: Sequence[str]) -> None:
        from webdataset.tariterators import base_plus_ext

        self.files = list(files)
        names: list[str] = []
        # per image: number of the shard, then offset and size of the image and of its .cls member
        locations = array("q")
        for number, file in enumerate(self.files):
            members = ((*base_plus_ext(member.name), member) for member in read_members(file))
            for key, sample in groupby(members, lambda member: member[0]):
                parts = [(ext.lower(), member) for _, ext, member in sample if key]
                images = [part for part in parts if f".{part[0]}".endswith(EXTENSIONS)]
                if images:
                    _, image = min(images, key=lambda image: "." in image[0])
                    names.append(image.name)
                    label = next(((cls.offset_data, cls.size) for ext, cls in parts if ext == "cls"), (0, 0))
                    locations.extend((number, image.offset_data, image.size, *label))
        if not locations:
            raise UserError(f"{name_files(self.files)}: contains no images")
        self.names = PackedStrings(names)
        self.locations = np.array(locations).reshape(-1, 5)
        self.parent = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in self.files])

    def __len__(self) -> int:
        return len(self.locations)

    def name(self, index: int) -> str:
        return f"{self.files[self.locations[index, 0]]}:{self.names[index]}"

    def key(self, index: int) -> str:
        shard = os.path.relpath(self.files[self.locations[index, 0]], self.parent)
        return f"{Path(shard).as_posix()}:{self.names[index]}"

    def label(self, index: int) -> str | None:
        number, _, _, offset, size = self.locations[index].tolist()
        return self.read(number, offset, size).decode(errors="replace").strip() if size else None

    def load(self, index: int) -> Pixels:
        number, offset, size, *_ = self.locations[index].tolist()
        return decode_image(io.BytesIO(self.read(number, offset, size)))

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Reads `size` bytes at `offset` of shard `number`; `BadImage` if that fails."""
        try:
            with open_regular(Path(self.files[number])) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


def read_members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of the regular files in a .tar file.

    Raises:
        UserError: the file is no uncompressed .tar file, or is truncated or corrupt.
    """
    try:
        with open_regular(Path(path)) as file:
            with tarfile.open(path, "r:", fileobj=file) as tar:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        yield member
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole .tar file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if end.strip(b"\0"):  # tarfile takes an invalid header for the end of the archive
        raise UserError(f"{path}: not a whole .tar file: broken header after {tar.offset} bytes")
