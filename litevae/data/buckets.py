"""Aspect-ratio buckets: what is encoded of an image, and in which of the sizes that a model takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.pixels import BadImage, Pixels, with_pillow
from litevae.data.sources import ImageSource
from litevae.data.squares import middle_square

Crop = Literal["middle", "shorter", "area"]

MAX_RATIO = 4  # of the longer side to the shorter one, as in the buckets of NovelAI and SDXL

MIDDLE = "the middle square, resized by Pillow's antialiased bicubic"  # as index.json has it


@dataclass(frozen=True)
class Buckets:
    """The sizes to which images are resized.

    With "shorter" and "area", the whole image is resized, and each side is rounded down to a multiple of `step`. What
    the rounding leaves over, less than `step` pixels of one side, is cut off in equal parts at both ends.

    Args:
        crop: "middle" takes the largest square from the middle of an image and resizes it to `size` pixels;
            "shorter" resizes the shorter side to `size`; "area" resizes the area to `size` squared.
        size: side in pixels, a multiple of `step`.
        step: number of which all sides are multiples.
    """

    crop: Crop
    size: int
    step: int

    @property
    def description(self) -> str:
        """What is encoded of an image, for index.json."""
        return MIDDLE if self.crop == "middle" else f"{self.crop}, bucket step {self.step}"

    def find(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width to which an image is resized.

        Raises:
            BadImage: the whole image is taken, and one side is more than 4 times the other.
        """
        size, step, shorter = self.size, self.step, min(height, width)
        if self.crop == "middle":
            return size, size
        if max(height, width) > MAX_RATIO * shorter:
            raise BadImage(f"{width}x{height} pixels, longer than {MAX_RATIO}:1")
        if self.crop == "shorter":
            return size * height // (shorter * step) * step, size * width // (shorter * step) * step
        # size * sqrt(height / width) and size * sqrt(width / height), in whole steps
        rows = isqrt(size**2 * height // (width * step**2))
        columns = isqrt(size**2 * width // (height * step**2))
        return rows * step, columns * step

    def resize(self, pixels: Pixels) -> Pixels:
        """Resizes an (H, W, C) image; `BadImage` if `find` raises it."""
        if self.crop == "middle":
            return middle_square(pixels, self.size)
        height, width = self.find(*pixels.shape[:2])
        return with_pillow(
            pixels, lambda image: ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        )


class BucketImage(NamedTuple):
    """One resized image."""

    number: int  # in its source
    pixels: Tensor  # (C, H, W); of an image that cannot be used, a black square or (C, 0, 0)
    label: str | None  # class of the image
    error: str | None  # reason why the image cannot be used


class BucketBatch(NamedTuple):
    """Resized images in one tensor, so that a process passes a single block of memory to another."""

    numbers: list[int]
    shapes: list[tuple[int, ...]]  # (C, H, W) of each image; (C, 0, 0) for one that cannot be used
    pixels: Tensor  # (n,), the images one after the other
    labels: list[str | None]
    errors: dict[int, str]  # by number, the reason why the image cannot be used

    def images(self) -> list[Tensor]:
        """Returns the images, (C, H, W) each, which share the memory of `pixels`."""
        parts = zip(self.pixels.split([prod(shape) for shape in self.shapes]), self.shapes, strict=True)
        return [part.view(*shape) for part, shape in parts]


class BucketDataset(Dataset[BucketImage]):
    """The images of a source in their sizes, for a DataLoader with `collate_images` as its `collate_fn`.

    With "middle", a black square stands for an image that cannot be used, so that all batches have one shape.
    """

    def __init__(self, images: ImageSource, buckets: Buckets) -> None:
        self.images, self.buckets = images, buckets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> BucketImage:
        try:
            pixels = self.buckets.resize(self.images.load(number))
            label = self.images.label(number)
        except BadImage as error:
            side = self.buckets.size if self.buckets.crop == "middle" else 0
            return BucketImage(number, self.images.pixel_format.black(side, side), None, str(error))
        return BucketImage(number, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), label, None)


def collate_images(images: Sequence[BucketImage]) -> BucketBatch:
    """Joins images of any sizes."""
    return BucketBatch(
        [image.number for image in images],
        [tuple(image.pixels.shape) for image in images],
        torch.cat([image.pixels.flatten() for image in images]),
        [image.label for image in images],
        {image.number: image.error for image in images if image.error is not None},
    )
