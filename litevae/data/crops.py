"""Training data: random square crops of images, and the images that could not be used for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.bad_images import BadEntry, allowed_bad
from litevae.data.pixels import BadImage, Pixels, resize_window
from litevae.data.remote_parquet import GROUPS_TOGETHER, RemoteParquet
from litevae.data.sources import ImageSource, Photographs
from litevae.errors import UserError

# defaults of torchvision's RandomResizedCrop
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)


class CropItem(NamedTuple):
    crop: Tensor  # (C, size, size) in the images' format
    bad: list[BadEntry]  # unusable images that were drawn before the one in `crop`
    number: int = 0  # of the image in its source
    mirrored: bool = False


class CropBatch(NamedTuple):
    images: Tensor  # (N, C, size, size) in the images' format
    bad: list[BadEntry]
    moments: Tensor | None = None  # (N, 2 n_z, h, w) float32, if a teacher's latents come with the crops


def collate(items: Sequence[CropItem]) -> CropBatch:
    """Stacks the crops and joins the lists of bad images; a `collate_fn` for a DataLoader."""
    return CropBatch(torch.stack([item.crop for item in items]), [bad for item in items for bad in item.bad])


class Order:
    """Shuffled epochs of `count` items as one endless sequence.

    A call maps a position in the sequence to the number of the item there.

    Args:
        count: number of items.
        seed: seed of the order.
        groups: numbers of the first items of the groups that are read as a whole, from 0 on. The groups are shuffled,
            and then the items of `GROUPS_TOGETHER` consecutive groups each. None shuffles all items together.
    """

    def __init__(self, count: int, seed: int, groups: npt.NDArray[np.int64] | None = None) -> None:
        self.count, self.seed, self.groups = count, seed, groups
        self.epoch = -1
        self.order = np.empty(0, np.int64)

    def __call__(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            random = np.random.default_rng((self.seed, epoch, 1))
            if self.groups is None:
                self.order = random.permutation(self.count)
            else:
                self.order = self.order_groups(self.groups, random)
        return int(self.order[position])

    def order_groups(
        self, groups: npt.NDArray[np.int64], random: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Returns the order of an epoch in which each group is read once."""
        items = np.split(np.arange(self.count), groups[1:])
        shuffled = [items[number] for number in random.permutation(len(items))]
        starts = range(0, len(shuffled), GROUPS_TOGETHER)
        parts = [np.concatenate(shuffled[start : start + GROUPS_TOGETHER]) for start in starts]
        return np.concatenate([random.permutation(part) for part in parts])


@dataclass(frozen=True)
class CropSettings:
    """How to crop training images, as the settings of the same names in `DataConfig`.

    `size`: side of a crop in pixels. `crop`: choice of the window. `flip`: whether to mirror half of the crops.
    `max_bad_fraction`: fraction of the images that may be unusable.
    """

    size: int
    crop: Literal["random", "random_resized", "native", "middle"]
    flip: bool
    max_bad_fraction: float


class TrainingCrops(Dataset[CropItem]):
    """Square crops of images, half of them mirrored, as one sequence over a whole run.

    Item i depends only on `seed`, i and the images. It does not depend on the number of workers or processes, nor
    on the step at which a run is resumed. Each epoch shuffles the images anew; the demo's photographs are instead
    drawn independently for each crop. Another image replaces one that cannot be read, and the item reports it.

    Args:
        images: source of the images.
        settings: how to crop the images.
        seed: seed of the order, the crops and the mirroring.
        length: number of items over all epochs and processes.

    Raises:
        UserError: `settings.crop` is "native", and a photograph of the demo is smaller than a crop.
    """

    def __init__(self, images: ImageSource, settings: CropSettings, seed: int, length: int) -> None:
        self.images = images
        self.settings = settings
        self.seed = seed
        self.length = length
        self.redraw = isinstance(images, Photographs)
        groups = images.groups if isinstance(images, RemoteParquet) else None
        self.ordered = Order(len(images), seed, groups)
        if isinstance(images, Photographs) and settings.crop == "native":
            smallest = min(min(pixels.shape[:2]) for pixels in images.pixels)
            if settings.size > smallest:
                raise UserError(
                    f"crops of {settings.size} pixels do not fit photographs of {smallest} pixels"
                )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> CropItem:
        """Returns an item, whose crop is black if more images fail in a row than `max_bad_fraction` allows.

        `BadImages.add` then stops the run because of the item's list.
        """
        random = np.random.default_rng((self.seed, index))
        count = len(self.images)
        drawn = int(random.integers(count))
        allowed = allowed_bad(count, self.settings.max_bad_fraction)
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
            crop = resize_window(pixels, top, left, height, width, self.settings.size)
            mirrored = self.settings.flip and bool(random.integers(2))
            if mirrored:
                crop = crop[:, ::-1]
            pixels = crop.transpose(2, 0, 1).copy()
            return CropItem(torch.from_numpy(pixels), list(bad.items()), number, mirrored)
        return CropItem(
            self.images.pixel_format.black(self.settings.size, self.settings.size), list(bad.items())
        )

    def window(self, pixels: Pixels, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of the part of an image that becomes the crop."""
        height, width = pixels.shape[:2]
        size = self.settings.size
        if self.settings.crop == "random_resized":
            return random_resized_window(height, width, random)
        side = min(height, width)
        if self.settings.crop == "native":
            if side < size:
                raise BadImage(f"{width}x{height} pixels, smaller than a crop of {size}")
            side = size
        if self.settings.crop == "middle":
            return (height - side) // 2, (width - side) // 2, side, side
        top, left = (int(random.integers(length - side + 1)) for length in (height, width))
        return top, left, side, side


def random_resized_window(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of a window of random area and aspect ratio.

    The distribution is that of torchvision's RandomResizedCrop with its defaults: 8 % to 100 % of the image's
    area, and an aspect ratio of 3/4 to 4/3.
    """
    for _ in range(10):
        area = height * width * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
            return int(top), int(left), rows, columns
    # The image is too elongated: take its middle, with the nearest allowed aspect ratio.
    rows = min(height, max(1, round(width / ASPECT_RATIO[0])))
    columns = min(width, max(1, round(height * ASPECT_RATIO[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns
