"""Where images come from: a folder, WebDataset shards, a Hugging Face dataset, or the demo's photographs."""

import glob
import io
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from litevae.data.images import BadImage, Pixels, decode
from litevae.errors import UserError

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Real colour photographs that lie inside the scikit-image wheel, so that nothing is downloaded.
TRAINING_PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "rocket",
    "motorcycle_left",
    "motorcycle_right",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)
HELD_OUT_PHOTOGRAPH = "chelsea"


class ImageSource(Protocol):
    """Images by number, in an order that is the same each time the source is opened.

    Holds little memory for each image and no open file, so that copies of it serve worker processes.
    """

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image is, for people to find it."""

    def key(self, index: int) -> str:
        """The image's name within the source: the same wherever the source lies."""

    def label(self, index: int) -> str | None:
        """The image's class: the folder that it lies in, a shard's .cls, a dataset's column `label`."""

    def load(self, index: int) -> Pixels:
        """(H, W, 3) uint8 as `litevae.data.images.decode` makes it; BadImage where it cannot."""


def open_images(path: str) -> ImageSource:
    """The images at a path, whose kind is recognised.

    Args:
        path: one of
            a folder with images, searched through all its folders (hidden ones left out);
            WebDataset shards on local disks: a folder of .tar files, one file, or a pattern of them with
            *, ? and braces, such as "train-{000..146}.tar", or several joined by "::";
            a Hugging Face dataset in a folder that `Dataset.save_to_disk` has written;
            a .parquet file, or a pattern of them, with a column of images (`datasets` copies its content
            into its cache once);
            "demo": scikit-image's photographs for training.

    Raises:
        UserError: nothing there, no images in it, several kinds in it, or a broken archive.
    """
    if path == "demo":
        return Photographs(TRAINING_PHOTOGRAPHS)
    if not path:
        raise UserError("no images given: name a folder, .tar shards, a dataset, or demo")
    if "://" in path or path.startswith("pipe:"):
        raise UserError(f"{path}: images are read from local disks only, not from addresses")
    path = os.path.expanduser(path)  # a shell leaves the ~ of data.train=~/images to us
    if os.path.isdir(path):
        return open_folder(Path(path))
    files = [path] if os.path.exists(path) else expand(path)
    if not files:
        raise UserError(f"{path}: no such file or folder, and no pattern that matches any")
    kinds = {Path(file).suffix.lower() for file in files}
    if kinds == {".tar"}:
        return Shards(files)
    if kinds == {".parquet"}:
        return HuggingFace.from_parquet(files)
    if kinds & {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"}:
        raise UserError(
            f"{path}: single images cannot be read out of compressed archives: unpack them to .tar"
        )
    raise UserError(f"{path}: must be a folder, or name only .tar files or only .parquet files")


def open_folder(folder: Path) -> ImageSource:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return HuggingFace.from_disk(folder)
    shards = sorted(str(file) for file in folder.glob("*.tar"))
    images = PackedStrings(os.path.relpath(path, folder) for path in walk(folder))
    if shards and images:
        raise UserError(f"{folder}: has both images and .tar shards: name one kind, such as {folder}/*.tar")
    if shards:
        return Shards(shards)
    if not images:
        if next(folder.rglob("*.parquet"), None):
            raise UserError(
                f"{folder}: has .parquet files: name those of one split, such as {folder}/train-*.parquet"
            )
        raise UserError(f"{folder}: no images in this folder or in those inside it")
    return Folder(folder, images)


def expand(pattern: str) -> list[str]:
    """The files of a pattern with braces, wildcards and "::", in the order of its parts, each once; none if a
    pattern of one part matches none. UserError if one of several does."""
    from webdataset.shardlists import expand_urls  # slow to import

    try:
        parts = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{pattern}: {error}") from None
    files: list[str] = []
    for part in parts:
        found = sorted(glob.glob(part, recursive=True))
        if not found and len(parts) > 1:
            raise UserError(f"{part}: no such file (of {pattern})")
        files += found
    return list(dict.fromkeys(files))


def walk(folder: Path) -> Iterator[str]:
    """Paths of the files below `folder` that have an image's extension, in sorted order.

    Links to folders are followed, but no folder is visited twice: links may lead in circles.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(place, name)


class PackedStrings:
    """Strings in one array of bytes.

    As a list, a million paths would take 100 MB, and again in each worker process: reading a Python object
    counts its references, and thereby copies the page that it lies on.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        data, ends = bytearray(), [0]
        for string in strings:
            data += os.fsencode(string)  # takes any file's name, whatever its encoding
            ends.append(len(data))
        self.data = np.frombuffer(bytes(data), np.uint8)
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.data[self.ends[index] : self.ends[index + 1]].tobytes())


class Photographs:
    """Photographs of scikit-image, in memory."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.pixels = [load_photograph(name) for name in names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    key = name

    def label(self, index: int) -> None:
        return None

    def load(self, index: int) -> Pixels:
        return self.pixels[index]


def load_photograph(name: str) -> Pixels:
    """A photograph of `skimage.data` by its function's name, or motorcycle_left / motorcycle_right."""
    from skimage import data  # slow to import, and only the demo needs it

    if name.startswith("motorcycle_"):
        return data.stereo_motorcycle()[name == "motorcycle_right"]
    return getattr(data, name)()


class Folder:
    """Image files by their paths within a folder."""

    def __init__(self, folder: Path, paths: PackedStrings) -> None:
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.folder / self.paths[index])

    def key(self, index: int) -> str:
        return Path(self.paths[index]).as_posix()

    def label(self, index: int) -> str | None:
        folder = Path(self.paths[index]).parent
        return folder.as_posix() if folder.name else None

    def load(self, index: int) -> Pixels:
        return decode(Path(self.name(index)))


class Shards:
    """The images in .tar files of the WebDataset format, read by their places in them.

    Each shard's headers are read once, here; the images are not. As in `webdataset`, a sample is the run of
    members with the same path up to the first dot. Its image is the member whose extension is an image's:
    x.jpg rather than x.mask.png, and otherwise the first. Samples without an image are passed over.

    Raises:
        UserError: a shard that is missing, broken, compressed or cut off, or no image in any.
    """

    def __init__(self, files: Sequence[str]) -> None:
        from webdataset.tariterators import base_plus_ext

        self.files = list(files)
        names: list[str] = []
        places = array(
            "q"
        )  # of each image: number of the shard, offset and bytes of the image and of its .cls
        for number, file in enumerate(self.files):
            members = ((*base_plus_ext(member.name), member) for member in tar_members(file))
            for key, sample in groupby(members, lambda member: member[0]):
                parts = [(ext.lower(), member) for _, ext, member in sample if key]
                images = [part for part in parts if f".{part[0]}".endswith(EXTENSIONS)]
                if images:
                    _, image = min(images, key=lambda image: "." in image[0])
                    names.append(image.name)
                    label = next(((cls.offset_data, cls.size) for ext, cls in parts if ext == "cls"), (0, 0))
                    places.extend((number, image.offset_data, image.size, *label))
        if not places:
            raise UserError(f"{and_more(self.files)}: no images in there")
        self.names = PackedStrings(names)
        self.places = np.array(places).reshape(-1, 5)
        self.parent = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in self.files])

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]]}:{self.names[index]}"

    def key(self, index: int) -> str:
        shard = os.path.relpath(self.files[self.places[index, 0]], self.parent)
        return f"{Path(shard).as_posix()}:{self.names[index]}"

    def label(self, index: int) -> str | None:
        number, _, _, offset, size = self.places[index].tolist()
        return self.read(number, offset, size).decode(errors="replace").strip() if size else None

    def load(self, index: int) -> Pixels:
        number, offset, size, *_ = self.places[index].tolist()
        return decode(io.BytesIO(self.read(number, offset, size)))

    def read(self, number: int, offset: int, size: int) -> bytes:
        try:
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """The plain files in a .tar; UserError if it is not one, or not whole."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member
        with open(path, "rb") as file:
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole .tar file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if end.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise UserError(f"{path}: not a whole .tar file: broken header after {tar.offset} bytes")


class HuggingFace:
    """The images in a column of a `datasets.Dataset`, decoded by us rather than by `datasets`.

    Args:
        dataset: any.
        path: of it, for messages.

    Raises:
        UserError: no column of images, or several of which none is called "image"; no rows.
    """

    def __init__(self, dataset: Any, path: str) -> None:
        from datasets import Image

        columns = [
            column
            for column, feature in dataset.features.items()
            # files without `datasets`' notes have a plain structure for an image
            if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
        ]
        if not columns:
            raise UserError(f"{path}: has no column of images, only {', '.join(dataset.features)}")
        if len(columns) > 1 and "image" not in columns:
            raise UserError(f"{path}: images are in {', '.join(columns)}: rename the column to use to image")
        if not len(dataset):
            raise UserError(f"{path}: has no rows")
        self.path = path
        self.column = "image" if "image" in columns else columns[0]
        dataset = dataset.with_format(None)
        self.labels = dataset.select_columns("label") if "label" in dataset.features else None
        dataset = dataset.select_columns(self.column)
        self.dataset = dataset.cast_column(self.column, Image(decode=False))

    @classmethod
    def from_disk(cls, folder: Path) -> "HuggingFace":
        """What `save_to_disk` has written; a dictionary of splits must have only one."""
        datasets = import_datasets(str(folder))
        loaded = quietly(str(folder), datasets.load_from_disk, str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if len(loaded) != 1:
                raise UserError(
                    f"{folder}: has the splits {', '.join(loaded)}: name one, such as {folder}/train"
                )
            (loaded,) = loaded.values()
        return cls(loaded, str(folder))

    @classmethod
    def from_parquet(cls, files: Sequence[str]) -> "HuggingFace":
        datasets = import_datasets(files[0])
        name = and_more(files)
        return cls(quietly(name, datasets.Dataset.from_parquet, list(files)), name)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def key(self, index: int) -> str:
        return f"row {index}"

    def label(self, index: int) -> str | None:
        if self.labels is None:
            return None
        label = self.labels[index]["label"]
        if label is None or label == -1:  # what `datasets` has for an unknown one
            return None
        feature = self.labels.features["label"]  # a ClassLabel knows the names of its classes
        return feature.int2str(label) if hasattr(feature, "int2str") else str(label)

    def load(self, index: int) -> Pixels:
        try:
            image = self.dataset[index][self.column]
        except Exception as error:  # pyarrow's, for files that are broken or gone
            raise BadImage(f"cannot be read: {' '.join(str(error).split())}") from None
        if image and image["bytes"] is not None:
            return decode(io.BytesIO(image["bytes"]))
        if image and image["path"]:
            return decode(Path(image["path"]))
        raise BadImage("the row is empty")


def import_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: reading this needs the package datasets: pip install 'litevae[datasets]'"
        ) from None
    return datasets


def quietly(name: str, function: Any, argument: Any) -> Any:
    """`function(argument)` without progress bars; UserError, beginning with `name`, for any failure."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return function(argument)
    except Exception as error:  # `datasets` raises its own and pyarrow's
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())}") from None
    finally:
        if not hidden:
            enable_progress_bars()


def and_more(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
