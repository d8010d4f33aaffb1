"""Sorting of images by size into batches for the encoder."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from litevae.data.buckets import BucketBatch

MAX_WAITING = 2**28  # bytes of images that wait for others of their size


class Batch(NamedTuple):
    numbers: list[int]  # of the images, in ascending order
    pixels: Tensor  # (N, C, H, W)


class BatchQueue:
    """Collects images until there are enough of a size.

    The batches depend on the images' order alone, not on the parts in which they arrive. They also stay the same when
    the images of the first batches are left out, as after an interruption.

    Args:
        batch_size: maximum number of images per batch.
        size: a batch has at most as many pixels as `batch_size` squares of this side, but at least one image.

    Attributes:
        ready: batches to encode.
        waiting: numbers and pixels (C, H, W) of the images that wait for others, by size.
    """

    def __init__(self, batch_size: int, size: int) -> None:
        self.batch_size, self.max_pixels = batch_size, batch_size * size**2
        self.ready: deque[Batch] = deque()
        self.waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}

    def capacity(self, height: int, width: int) -> int:
        """Returns the maximum number of images of this size per batch."""
        return max(1, min(self.batch_size, self.max_pixels // (height * width)))

    def add(self, batch: BucketBatch) -> int:
        """Adds the images that have pixels, and returns their number."""
        # Older versions of PyTorch turn tuples into lists where they pin memory.
        shapes = {tuple(shape) for shape in batch.shapes}
        if len(shapes) == 1 and not self.waiting:
            channels, height, width = shapes.pop()
            if height and len(batch.numbers) == self.capacity(height, width):  # nothing needs to be copied
                self.ready.append(Batch(batch.numbers, batch.pixels.view(-1, channels, height, width)))
                return len(batch.numbers)
        images = [pair for pair in zip(batch.numbers, batch.images(), strict=True) if pair[1].numel()]
        for number, image in images:
            self.add_image(number, image.clone())  # a view would keep the whole batch in memory
        return len(images)

    def add_image(self, number: int, image: Tensor) -> None:
        """Adds a (C, H, W) image; the fullest batch becomes ready when too much memory waits."""
        size = (image.shape[1], image.shape[2])
        self.waiting.setdefault(size, []).append((number, image))
        if len(self.waiting[size]) == self.capacity(*size):
            self.take(size)
            return
        lengths = {each: images[0][1].nbytes * len(images) for each, images in self.waiting.items()}
        if sum(lengths.values()) > max(MAX_WAITING, image[:, 0, 0].nbytes * self.max_pixels):
            self.take(max(lengths, key=lambda each: lengths[each]))

    def take(self, size: tuple[int, int]) -> None:
        """Makes the waiting images of a size a batch."""
        numbers, images = zip(*self.waiting.pop(size), strict=True)
        self.ready.append(Batch(list(numbers), torch.stack(images)))

    def flush(self) -> None:
        """Makes all waiting images batches."""
        for size in list(self.waiting):
            self.take(size)
