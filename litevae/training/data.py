"""Training data: crops of images, those that cannot be read, and the images to validate on."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.errors import UserError
from litevae.images import BadImage, Pixels, resize_window
from litevae.training.config import DataConfig
from litevae.training.sources import HELD_OUT_PHOTOGRAPH, ImageSource, Photographs, open_images

BAD_IMAGES = "bad_images.txt"  # the list's name in a run's folder
Bad = tuple[str, str]  # an image's name, and why it cannot be used

# of RandomResizedCrop in torchvision
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)


class Item(NamedTuple):
    crop: Tensor  # (3, size, size) uint8
    bad: list[Bad]  # images that could not be used on the way


class Batch(NamedTuple):
    images: Tensor  # (N, 3, size, size) uint8
    bad: list[Bad]


def collate(items: Sequence[Item]) -> Batch:
    """For a DataLoader: crops become one tensor, reports of bad images one list."""
    return Batch(torch.stack([item.crop for item in items]), [bad for item in items for bad in item.bad])


class Order:
    """Shuffled epochs of `count` items as one endless sequence: called with a place in it, gives the number of the
    item there."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.epoch = -1
        self.order = np.empty(0, np.int64)

    def __call__(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.count)
        return int(self.order[place])


class TrainingCrops(Dataset[Item]):
    """Square crops of images, half of them mirrored, as one sequence over a whole run.

    Item i depends on `seed`, i and the images alone: it is the same from run to run, however many workers or
    processes share the work, and wherever a run begins. The images come in a new order each time all have
    been used; those of the demo are drawn anew for each crop. In place of an image that cannot be read comes
    another, and the item says so.

    Args:
        images: to crop.
        config: `size`, `crop`, `flip` and `max_bad_fraction` are used.
        seed: of the order, the crops and the mirroring.
        length: number of items: of all epochs and processes.

    Raises:
        UserError: a photograph of the demo smaller than a crop, where crops are not resized.
    """

    def __init__(self, images: ImageSource, config: DataConfig, seed: int, length: int) -> None:
        self.images = images
        self.config = config
        self.seed = seed
        self.length = length
        self.redraw = isinstance(images, Photographs)
        self.ordered = Order(len(images), seed)
        if isinstance(images, Photographs) and config.crop == "native":
            smallest = min(min(pixels.shape[:2]) for pixels in images.pixels)
            if config.size > smallest:
                raise UserError(f"crops of {config.size} pixels do not fit photographs of {smallest} pixels")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        """If more images than `max_bad_fraction` allows fail in a row, the crop is black; `BadImages.add`
        stops the run over the item's list."""
        random = np.random.default_rng((self.seed, index))
        count = len(self.images)
        drawn = int(random.integers(count))
        allowed = allowed_bad(count, self.config.max_bad_fraction)
        bad: dict[str, str] = {}
        for attempt in range(count + 1):
            number = self.ordered(index) if attempt == 0 and not self.redraw else (drawn + attempt) % count
            try:
                pixels = self.images.load(number)
                top, left, height, width = self.window(pixels, random)
            except BadImage as reason:
                bad[self.images.name(number)] = str(reason)
                if len(bad) > allowed:
                    break
                continue
            crop = resize_window(pixels, top, left, height, width, self.config.size)
            if self.config.flip and random.integers(2):
                crop = crop[:, ::-1]
            return Item(torch.from_numpy(crop.transpose(2, 0, 1).copy()), list(bad.items()))
        return Item(torch.zeros(3, self.config.size, self.config.size, dtype=torch.uint8), list(bad.items()))

    def window(self, pixels: Pixels, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part of an image that becomes the crop."""
        height, width = pixels.shape[:2]
        size = self.config.size
        if self.config.crop == "random_resized":
            return random_resized_window(height, width, random)
        side = min(height, width)
        if self.config.crop == "native":
            if side < size:
                raise BadImage(f"{width}x{height} pixels, smaller than a crop of {size}")
            side = size
        top, left = (int(random.integers(length - side + 1)) for length in (height, width))
        return top, left, side, side


def random_resized_window(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """A window of a random area and aspect ratio, as torchvision's RandomResizedCrop draws it by default:
    8 % to 100 % of the image, 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
            return int(top), int(left), rows, columns
    # too long an image: the middle, as near to its aspect ratio as is allowed
    rows = min(height, max(1, round(width / ASPECT_RATIO[0])))
    columns = min(width, max(1, round(height * ASPECT_RATIO[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def allowed_bad(total: int, max_fraction: float) -> int:
    return math.floor(round(total * max_fraction, 6))  # 0.29 x 100 is 28.999999999999996


class BadImages:
    """The list of images that a run could not use, in a file with a line for each: name, tab, reason.

    A file that is there is continued: delete it for a new run. The processes of a run may each have one of
    these on the same file.

    Args:
        path: of the file; it is made when the first image fails.
        total: number of images in the data set.
        max_fraction: of them that may fail.
        setting: what the user calls `max_fraction`.
    """

    def __init__(
        self, path: Path, total: int, max_fraction: float, setting: str = "data.max_bad_fraction"
    ) -> None:
        self.path = path
        self.setting = setting
        self.total = total
        self.max_fraction = max_fraction
        self.names: set[str] = set()
        self.drop_unfinished_line()
        self.read()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, bad: Iterable[Bad]) -> None:
        """Lists those not yet listed.

        Raises:
            UserError: more are listed now than may fail, or the list cannot be written.
        """
        lines = {one_field(name): one_field(reason) for name, reason in bad}
        if lines.keys() - self.names:
            self.read()  # what other processes have found
            new = {name: reason for name, reason in lines.items() if name not in self.names}
            text = "".join(f"{name}\t{reason}\n" for name, reason in new.items())
            try:
                with open(self.path, "ab") as file:
                    file.write(os.fsencode(text))
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
            self.names |= new.keys()
        if len(self.names) > allowed_bad(self.total, self.max_fraction):
            raise UserError(
                f"{len(self.names)} of {self.total} images cannot be used, more than "
                f"{self.setting}={self.max_fraction:g} allows: {self.path} lists them"
            )

    def read(self) -> None:
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            self.names |= {os.fsdecode(line).partition("\t")[0] for line in lines}

    def drop_unfinished_line(self) -> None:
        """What a full disk may have left."""
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)


def one_field(text: str) -> str:
    """Without the signs that end a field of the list."""
    return text.translate({ord("\t"): r"\t", ord("\r"): r"\r", ord("\n"): r"\n"})


class Validation(NamedTuple):
    images: list[tuple[str, Pixels]]  # name and (size, size, 3)
    bad: list[Bad]


def open_validation(config: DataConfig) -> ImageSource | None:
    """The images at `config.validation`, the demo's held-out photograph for the demo, or None.

    Raises:
        UserError: as `open_images`.
    """
    if config.validation == "demo" or (config.train == "demo" and not config.validation):
        return Photographs([HELD_OUT_PHOTOGRAPH])
    return open_images(config.validation) if config.validation else None


def load_validation(images: ImageSource, size: int, count: int, at_least: int = 1) -> Validation:
    """The middle square of each image, as large as the shorter side allows, resized to `size`.

    Args:
        images: of which `count` are taken at equal distances, or all if there are fewer; those that cannot
            be read are left out.
        size: in pixels. Pillow's bicubic, antialiased.
        count: at most.
        at_least: that many must be readable.

    Raises:
        UserError: fewer of them can be read.
    """
    result = Validation([], [])
    count = min(count, len(images))
    for number in (place * len(images) // count for place in range(count)):
        name = images.name(number)
        try:
            pixels = images.load(number)
        except BadImage as error:
            result.bad.append((name, str(error)))
            continue
        result.images.append((name, middle_square(pixels, size)))
    if len(result.images) < at_least:
        name, reason = result.bad[0]
        raise UserError(f"none of the {count} images to validate on can be read; {name}: {reason}")
    return result


def middle_square(pixels: Pixels, size: int) -> Pixels:
    """The largest square in the middle of an (H, W, 3) image, resized to `size` pixels."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    return resize_window(pixels, (height - side) // 2, (width - side) // 2, side, side, size)


def load_square(images: ImageSource, index: int, size: int) -> Tensor:
    """`middle_square` of an image, (3, size, size) uint8; raises BadImage."""
    return torch.from_numpy(middle_square(images.load(index), size).transpose(2, 0, 1).copy())
