"""Sources of images: a folder, WebDataset shards, a Hugging Face dataset, or the demo's photographs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from litevae.data.hugging_face import HuggingFaceImages
from litevae.data.images import convert, decode_image
from litevae.data.paths import PackedStrings, expand_pattern, find_images
from litevae.data.pixels import RGB, PixelFormat, Pixels
from litevae.data.remote import check_address, is_remote, redact, redact_pattern
from litevae.data.remote_parquet import RemoteParquet
from litevae.data.tar_shards import TarShards
from litevae.errors import UserError
from litevae.files import why_missing

# Real colour photographs that the scikit-image wheel contains, so that nothing is downloaded.
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

    A source needs little memory per image and keeps no file open, so that it can be copied to worker processes.
    """

    @property
    def pixel_format(self) -> PixelFormat:
        """What all of the images are."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the image's location, for messages."""

    def key(self, index: int) -> str:
        """Returns the image's name within the source, which does not depend on the source's location."""

    def label(self, index: int) -> str | None:
        """Returns the image's class: its folder, the shard's .cls member, or the dataset's column `label`.

        Raises:
            BadImage: it cannot be read, or is no class.
        """

    def load(self, index: int) -> Pixels:
        """Returns (H, W, C) pixels in this format, as `decode_image` does; `BadImage` if that fails."""


def open_images(path: str, pixel_format: PixelFormat = RGB) -> ImageSource:
    """Opens the images at a path, whose kind is recognised.

    Args:
        path: one of
            a folder with images, searched with all its subfolders (except hidden ones);
            WebDataset shards: a folder of .tar files, one file, or a pattern with *, ? and
            braces, such as "train-{000..146}.tar", or several joined by "::";
            a Hugging Face dataset in a folder that `Dataset.save_to_disk` has written;
            a .parquet file, or a pattern, with a column of images (`datasets` copies its content
            into its cache once);
            addresses of .tar or .parquet files (s3://, gs://, hf://, https://), or patterns of
            them, whose images are fetched when they are needed; an address of a folder ends in /;
            "demo": scikit-image's photographs for training.
        pixel_format: what the images are. With a range of values, they are .npy, PNG or TIFF files.

    Raises:
        UserError: the path does not exist, holds no images or several kinds, or an archive is corrupt; or the demo's
            photographs are to have a range of values.
    """
    if path == "demo":
        return Photographs(TRAINING_PHOTOGRAPHS, pixel_format)
    if not path:
        raise UserError("no images given: name a folder, .tar shards, a dataset, or demo")
    if addresses := [part for part in path.split("::") if is_remote(part)]:
        for address in addresses:
            check_address(address)
        return open_files(expand_pattern(path), redact_pattern(path), pixel_format)
    path = os.path.expanduser(path)  # a shell does not expand the ~ of data.train=~/images
    if os.path.isdir(path):
        return open_folder(Path(path), pixel_format)
    files = [path] if os.path.exists(path) else expand_pattern(path)
    if not files:
        reason = why_missing(path, "file or folder")
        raise UserError(f"{path}: {reason}, and no file matches it as a pattern")
    if special := next((file for file in files if not os.path.isfile(file)), None):  # a FIFO would block
        raise UserError(f"{special}: {why_missing(special, 'file')}")
    return open_files(files, path, pixel_format)


def open_files(files: list[str], path: str, pixel_format: PixelFormat) -> ImageSource:
    """Opens .tar or .parquet files at paths or addresses; `path` names them in messages.

    Raises:
        UserError: `open_images` lists the reasons.
    """
    kinds = {Path(redact(file) if is_remote(file) else file).suffix.lower() for file in files}
    if kinds == {".tar"}:
        return TarShards(files, pixel_format)
    if kinds == {".parquet"}:
        if any(map(is_remote, files)):
            return RemoteParquet(files, pixel_format)
        return HuggingFaceImages.from_parquet(files, pixel_format)
    if kinds & {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"}:
        raise UserError(
            f"{path}: single images cannot be read out of compressed archives: unpack them to .tar"
        )
    raise UserError(f"{path}: must be a folder, or name only .tar files or only .parquet files")


def open_folder(folder: Path, pixel_format: PixelFormat) -> ImageSource:
    """Opens the images in a folder: a saved dataset, .tar shards, or image files.

    Raises:
        UserError: `open_images` lists the reasons.
    """
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return HuggingFaceImages.from_disk(folder, pixel_format)
    shards = sorted(str(file) for file in folder.glob("[!.]*.tar"))
    images = PackedStrings(
        os.path.relpath(path, folder) for path in find_images(folder, pixel_format.extensions)
    )
    if shards and images:
        raise UserError(f"{folder}: has both images and .tar shards: name one kind, such as {folder}/*.tar")
    if shards:
        return TarShards(shards, pixel_format)
    if not images:
        if next(folder.rglob("*.parquet"), None):
            raise UserError(
                f"{folder}: has .parquet files: name those of one split, such as {folder}/train-*.parquet"
            )
        kinds = "" if pixel_format.value_range is None else f" ({', '.join(pixel_format.extensions)})"
        raise UserError(f"{folder}: no images{kinds} in this folder or its subfolders")
    return ImageFolder(folder, images, pixel_format)


class Photographs:
    """Photographs of scikit-image, in memory; `UserError` if they are to have a range of values."""

    def __init__(self, names: Sequence[str], pixel_format: PixelFormat = RGB) -> None:
        if pixel_format.value_range is not None:
            raise UserError(f"demo: its photographs have 8 bits, and the model's images are {pixel_format}")
        self.names, self.pixel_format = names, pixel_format
        self.pixels = [convert(load_photograph(name), pixel_format.channels) for name in names]

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
    """Returns a photograph of `skimage.data` by its function's name, or motorcycle_left / motorcycle_right."""
    from skimage import data  # slow to import, and only the demo needs it

    if name.startswith("motorcycle_"):
        return data.stereo_motorcycle()[name == "motorcycle_right"]
    return getattr(data, name)()


class ImageFolder:
    """Image files by their paths within a folder."""

    def __init__(self, folder: Path, paths: PackedStrings, pixel_format: PixelFormat = RGB) -> None:
        self.folder, self.paths, self.pixel_format = folder, paths, pixel_format

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
        return decode_image(Path(self.name(index)), self.pixel_format)
