"""Images in .tar files of the WebDataset format."""

import io
import os
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from litevae.data.images import EXTENSIONS, BadImage, Pixels, decode_image
from litevae.data.paths import PackedStrings, name_files
from litevae.errors import UserError
from litevae.files import open_regular


class TarShards:
    """The images in .tar files of the WebDataset format, read by their offsets.

    The constructor reads the headers of each shard once, but not the images. A sample consists of the members of a
    shard with the same path up to the first dot, in whichever order they are. Its image is the member with an image's
    extension: x.jpg rather than x.mask.png, and otherwise the first. Samples without an image and all further images
    are left out, and a line on stderr counts them.

    Args:
        files: paths of the shards, in their order.

    Raises:
        UserError: a shard is missing, corrupt, compressed or truncated; it holds a member twice, which `webdataset`
            refuses too; or no shard holds an image.
    """

    def __init__(self, files: Sequence[str]) -> None:
        from webdataset.tariterators import base_plus_ext

        self.files = list(files)
        names: list[str] = []
        # per image: number of the shard, then offset and size of the image and of its .cls member
        locations = array("q")
        left_out: Counter[str] = Counter()
        for number, file in enumerate(self.files):
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in read_members(file):
                key, ext = base_plus_ext(member.name)
                if not key:  # a hidden file, or one without an extension
                    continue
                if not member.isreg() or member.issparse():
                    left_out["links or sparse files with an image's name"] += is_image(ext)
                    continue
                sample = samples.setdefault(key, {})
                if ext.lower() in sample:
                    raise UserError(f"{file}: holds {member.name!r:.200} twice")
                sample[ext.lower()] = member
            for sample in samples.values():
                images = [ext for ext in sample if is_image(ext)]
                if not images:
                    left_out["samples without an image"] += 1
                    continue
                left_out["further images of the same samples"] += len(images) - 1
                image = sample[min(images, key=lambda ext: "." in ext)]
                names.append(image.name)
                cls = sample.get("cls")
                label = (cls.offset_data, cls.size) if cls else (0, 0)
                locations.extend((number, image.offset_data, image.size, *label))
        if not locations:
            raise UserError(f"{name_files(self.files)}: contains no images")
        counts = [f"{kind} ({count})" for kind, count in left_out.items() if count]
        if counts and os.environ.get("RANK", "0") == "0":  # only the first process prints
            print(f"{name_files(self.files)}: left out: {', '.join(counts)}", file=sys.stderr)
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
        label = self.read(number, offset, size).decode(errors="replace").strip() if size else ""
        return None if label in ("", "-1") else label  # -1 is an unknown class, as in `datasets`

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


def is_image(ext: str) -> bool:
    """Returns whether a member with this extension, such as "mask.png", is an image."""
    return f".{ext.lower()}".endswith(EXTENSIONS)


def read_members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the headers in a .tar file.

    Raises:
        UserError: the file is no uncompressed .tar file, or is truncated or corrupt.
    """
    try:
        with open_regular(Path(path)) as file:
            with tarfile.open(path, "r:", fileobj=file) as tar:
                yield from tar
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole .tar file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if end.strip(b"\0"):  # tarfile takes an invalid header for the end of the archive
        raise UserError(f"{path}: not a whole .tar file: broken header after {tar.offset} bytes")
