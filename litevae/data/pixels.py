"""What the pixels of a data set are, and their conversion between arrays and a model's tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from litevae.errors import shorten

# (H, W, C) levels in 0..255: uint8; or float32, not rounded, if a `PixelFormat` has a range of values.
Pixels = npt.NDArray[np.uint8 | np.float32]
Values = npt.NDArray[Any]  # (H, W) or (H, W, C) numbers, as a file stores them

COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(COLOURS)
LONGEST_LABEL = 1000  # characters of the name of an image's class
LARGEST_VALUE = 1e30  # of a range, because levels are float32
LARGEST_INTEGER = 2**53  # from there on, float64 does not hold every integer

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
VALUE_EXTENSIONS = (".npy", ".png", ".tif", ".tiff")


class BadImage(ValueError):
    """An image has no usable pixels. The message is the reason, in one line."""


def check_label_length(length: int) -> None:
    """Raises BadImage if the name of an image's class is so long that it cannot be one."""
    if length > LONGEST_LABEL:
        raise BadImage(f"its label must have at most {LONGEST_LABEL:,} characters, got {length:,}")


@dataclass(frozen=True)
class PixelFormat:
    """What the images of a model are.

    Without `value_range` they are pictures of 8 bits: grey (Pillow's L), sRGB or RGBA. With it they are arrays of
    numbers, whose range is mapped linearly to a model's [-1, 1] without rounding them first.

    Args:
        channels: 1, 3 or 4.
        value_range: the stored values that become -1 and 1, or None. A list becomes a tuple.

    Raises:
        ValueError: an argument has another value. The message names it.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.channels not in CHANNELS:
            raise ValueError(f"channels must be 1, 3 or 4, got {shorten(self.channels)}")
        if self.value_range is None:
            return
        if not is_value_range(self.value_range):
            value: Any = self.value_range
            found = shorten(list(value) if isinstance(value, tuple) else value)
            raise ValueError(
                f"value_range must be two numbers, the lower first, such as [0,65535], got {found}"
            )
        object.__setattr__(self, "value_range", tuple(self.value_range))

    def __str__(self) -> str:
        """Describes what the images are, such as "RGB of 8 bits" or "values from 0 to 4095, 1 channel"."""
        if self.value_range is None:
            return f"{COLOURS[self.channels]} of 8 bits"
        low, high = self.value_range
        return f"values from {low:.12g} to {high:.12g}, {count_channels(self.channels)}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `Pixels` in this format."""
        return torch.uint8 if self.value_range is None else torch.float32

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions of files that may hold such images."""
        return EXTENSIONS if self.value_range is None else VALUE_EXTENSIONS

    def black(self, *shape: int) -> Tensor:
        """Returns images of `shape`, whose channels are chosen here: (..., C, H, W) for (..., H, W)."""
        *batch, height, width = shape
        return torch.zeros(*batch, self.channels, height, width, dtype=self.dtype)

    def to_levels(self, values: Values) -> Pixels:
        """Maps stored values (H, W) or (H, W, C) linearly from the range to 0..255, in float32.

        Raises:
            BadImage: there is another number of channels, a value is not finite or outside the range, or an integer is
                beyond 2^53, which float64 does not hold.
        """
        assert self.value_range is not None
        values = values[..., None] if values.ndim == 2 else values
        if values.shape[2] != self.channels:
            raise BadImage(f"has {count_channels(values.shape[2])}, and the model takes {self.channels}")
        if not np.isfinite(values).all():
            raise BadImage("has values that are infinite or NaN")
        low, high = self.value_range
        found = values.min(), values.max()
        if values.dtype.kind != "f" and max(-int(found[0]), int(found[1])) > LARGEST_INTEGER:
            raise BadImage("has integers beyond 2^53, which float64 does not hold")
        # 0.1 in the dtype of a file may be above the range's 0.1.
        ends = np.array(self.value_range, values.dtype if values.dtype.kind == "f" else np.float64)
        if found[0] < ends[0] or found[1] > ends[1]:
            raise BadImage(
                f"has values from {found[0]:.12g} to {found[1]:.12g}, outside the range from {low:.12g} to {high:.12g}"
            )
        levels = (values.astype(np.float64) - low) * (255 / (high - low))
        return levels.clip(0, 255).astype(np.float32)

    def to_values(self, levels: Pixels) -> npt.NDArray[np.float64]:
        """Maps levels in 0..255 back to stored values of the range, as float64; any shape."""
        assert self.value_range is not None
        low, high = self.value_range
        return low + levels.astype(np.float64) * ((high - low) / 255)

    def restore(self, levels: Pixels, like: Values) -> Values:
        """Returns the values of levels (H, W, C) in the shape and dtype of `like`.

        Integers are rounded, and clipped to those of the dtype that float64 holds.
        """
        values = self.to_values(levels).reshape(like.shape)
        if like.dtype.kind != "f":
            limits = np.iinfo(like.dtype)
            low, high = max(limits.min, -LARGEST_INTEGER), min(limits.max, LARGEST_INTEGER)
            values = np.rint(values).clip(low, high)
        return values.astype(like.dtype.newbyteorder("="))


RGB = PixelFormat()


def count_channels(channels: int) -> str:
    """Returns a number of channels in words, such as "1 channel"."""
    return f"{channels} channel{'s' * (channels != 1)}"


def is_value_range(value: Any) -> bool:
    """Returns whether a value is two numbers, the lower first, that float32 can hold."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(end, int | float) and not isinstance(end, bool) for end in value)
        and -LARGEST_VALUE <= value[0] < value[1] <= LARGEST_VALUE
    )


def resize_window(pixels: Pixels, top: int, left: int, height: int, width: int, size: int) -> Pixels:
    """Resizes a window of (H, W, C) `pixels` to (size, size, C) with Pillow's bicubic filter.

    The filter is antialiased where it shrinks. Only the window is resized, so that an image of 1 x 60000 pixels
    costs no more than any other. The colours of RGBA are weighted by their opacity, as Pillow does it, so that those of
    transparent pixels do not show at edges. Channels of float32 are resized each on its own and clipped to 0..255.
    """
    window = pixels[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    return with_pillow(window, lambda image: image.resize((size, size), Image.Resampling.BICUBIC))


def with_pillow(pixels: Pixels, function: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Applies a function of Pillow's images to (H, W, C) pixels; to each channel if they are grey or float32."""
    if pixels.dtype == np.uint8 and pixels.shape[2] != 1:
        return np.asarray(function(Image.fromarray(pixels)))
    channels = [
        np.asarray(function(Image.fromarray(pixels[..., channel]))) for channel in range(pixels.shape[2])
    ]
    result = np.stack(channels, axis=-1)
    return result if pixels.dtype == np.uint8 else result.clip(0, 255)


def to_picture(pixels: Pixels) -> Pixels:
    """Rounds (H, W, C) pixels to 8 bits, and repeats a single channel, for a picture in RGB or RGBA."""
    rounded = pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8)
    return rounded.repeat(3, axis=2) if rounded.shape[2] == 1 else rounded


def to_model_range(pixels: Tensor) -> Tensor:
    """Converts levels in 0..255, uint8 or float32, to float32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(image: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Converts floats in [-1, 1] (clamped) to levels: uint8, rounded to nearest, or float32; any shape."""
    levels = (image.float() + 1.0) * 127.5
    if dtype == torch.uint8:
        levels = levels.round_()
    return levels.clamp_(0, 255).to(dtype)


def as_batch(image: Pixels) -> Tensor:
    """Returns an (H, W, C) image as a (1, C, H, W) batch of the same dtype, which shares its memory."""
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)


def pad_image(image: Pixels, factor: int) -> Tensor:
    """Pads an (H, W, C) image to a (1, C, H', W') batch of the same dtype.

    The image is mirrored at the bottom and on the right until H' and W' are multiples of `factor`. They are at
    least twice `factor`, because GroupNorm cannot normalise a latent of one pixel.
    """
    height, width = (max(-(-size // factor), 2) * factor - size for size in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="symmetric")
    return as_batch(padded)
