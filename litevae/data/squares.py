"""The middle squares of images, for validation and evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.bad_images import BadEntry
from litevae.data.config import DataConfig
from litevae.data.pixels import BadImage, Pixels, resize_window
from litevae.data.sources import HELD_OUT_PHOTOGRAPH, ImageSource, Photographs, open_images
from litevae.errors import UserError


class Validation(NamedTuple):
    images: list[tuple[str, Pixels]]  # names and (size, size, C) pixels
    bad: list[BadEntry]


def open_validation(config: DataConfig) -> ImageSource | None:
    """Opens the validation images: those at `config.validation`, else the demo's held-out photograph, or None.

    Raises:
        UserError: `open_images` raises it.
    """
    if config.validation == "demo" or (config.train == "demo" and not config.validation):
        return Photographs([HELD_OUT_PHOTOGRAPH], config.pixel_format)
    return open_images(config.validation, config.pixel_format) if config.validation else None


class Square(NamedTuple):
    """The middle square of one image. Exactly one of `pixels` and `error` is None."""

    number: int  # position in the full sequence of squares
    pixels: Tensor | None  # (C, size, size) in the images' format
    error: str | None  # reason why the image cannot be read


class SquareBatch(NamedTuple):
    """A batch of squares, including the unreadable ones."""

    numbers: list[int]
    pixels: Tensor  # (N, C, size, size) in the images' format; black where an image cannot be read
    errors: dict[int, str]  # by number, the reason why the image cannot be read

    @property
    def readable(self) -> tuple[list[int], Tensor]:
        """The numbers and the pixels of the readable images."""
        if not self.errors:
            return self.numbers, self.pixels
        rows = [row for row, number in enumerate(self.numbers) if number not in self.errors]
        return [self.numbers[row] for row in rows], self.pixels[rows]


class SquareDataset(Dataset[Square]):
    """The middle squares of evenly spaced images, for a DataLoader with `collate` as its `collate_fn`.

    Args:
        images: source of the images.
        size: side of the squares in pixels; Pillow's antialiased bicubic filter resizes them.
        count: number of images, evenly spaced over the source; None, or more than there are, takes all.
        numbers: numbers of the squares that this data set yields, in their order; None yields all.
    """

    def __init__(
        self,
        images: ImageSource,
        size: int,
        count: int | None = None,
        numbers: range | None = None,
    ) -> None:
        self.images, self.size = images, size
        self.count = len(images) if count is None else min(count, len(images))
        self.numbers = range(self.count) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> Square:
        number = self.numbers[position]
        index = number * len(self.images) // self.count
        try:
            square = middle_square(self.images.load(index), self.size)
        except BadImage as error:
            return Square(number, None, str(error))
        pixels = torch.from_numpy(square.transpose(2, 0, 1).copy())
        return Square(number, pixels, None)

    def name(self, number: int) -> str:
        """Returns the name of the image that square `number` is cut from."""
        return self.images.name(number * len(self.images) // self.count)

    def none_readable(self) -> UserError:
        """Returns the error to raise if no image can be read. It names the first one and says why."""
        try:
            self.images.load(0)
        except BadImage as reason:
            return UserError(f"none of the {self.count} images can be read; {self.images.name(0)}: {reason}")
        return UserError(f"none of the {self.count} images could be read")  # the first one can be by now

    def collate(self, squares: Sequence[Square]) -> SquareBatch:
        """Stacks squares, with black pixels for the unreadable ones."""
        black = self.images.pixel_format.black(self.size, self.size)
        return SquareBatch(
            [square.number for square in squares],
            torch.stack([black if square.pixels is None else square.pixels for square in squares]),
            {square.number: square.error for square in squares if square.error is not None},
        )


def load_validation(images: ImageSource, size: int, count: int, at_least: int = 1) -> Validation:
    """Loads the middle square of each image, as large as the shorter side allows, resized to `size`.

    Args:
        images: source of the images; unreadable ones are left out.
        size: side of the squares in pixels.
        count: maximum number of images, evenly spaced over the source.
        at_least: number of images that must be readable.

    Raises:
        UserError: fewer than `at_least` of them can be read.
    """
    result = Validation([], [])
    squares = SquareDataset(images, size, count)
    for square in (squares[position] for position in range(len(squares))):
        name = squares.name(square.number)
        if square.pixels is None:
            result.bad.append((name, square.error or ""))
        else:
            result.images.append((name, square.pixels.permute(1, 2, 0).contiguous().numpy()))
    if len(result.images) < at_least:
        raise squares.none_readable()
    return result


def middle_square(pixels: Pixels, size: int) -> Pixels:
    """Cuts the largest square from the middle of an (H, W, C) image and resizes it to `size` pixels."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    return resize_window(pixels, (height - side) // 2, (width - side) // 2, side, side, size)
