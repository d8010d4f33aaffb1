"""Training data: crops of images, those that cannot be read, and the images to validate on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.bad_images import Bad, allowed_bad
from litevae.data.config import DataConfig
from litevae.data.images import BadImage, Pixels, resize_window
from litevae.data.sources import ImageSource, Photographs
from litevae.errors import UserError

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
