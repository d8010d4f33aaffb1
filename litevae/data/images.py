"""Decoding of image files to uint8 pixels, and conversion between pixels and a model's tensors."""

import warnings
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from litevae.errors import UserError

Pixels = npt.NDArray[np.uint8]  # (H, W, 3); embedded colour profiles are ignored

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # by the tag's value, the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image has no usable pixels. The message is the reason, in one line."""


@cache
def image_formats() -> list[str]:
    """Returns Pillow's names of the raster formats to decode, limited to those that this build supports.

    Pillow recognises a format by the content, whatever the file's name; for EPS it would start Ghostscript.
    """
    Image.init()
    known = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    return [name for name in known if name in Image.OPEN]


def decode_image(file: Path | IO[bytes]) -> Pixels:
    """Decodes an image file, or its content, to upright 8-bit RGB.

    Greyscale, palette and CMYK images are converted, transparent images are composited on white, 16-bit values
    are scaled to 8 bits (not clipped), and the first frame represents an animation. The EXIF orientation is
    applied; broken EXIF data are ignored.

    Raises:
        BadImage: the file does not exist, is no image, is truncated or corrupt, exceeds Pillow's limit of about
            179 million pixels (a decompression bomb), or has pixels of unknown colour (floating-point, LAB).
    """
    try:
        if isinstance(file, Path) and not file.is_file():
            special = "not a regular file" if file.exists() else "no such file"
            raise BadImage("is a folder, not an image" if file.is_dir() else special)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow would warn once per file with unusual metadata
            with Image.open(file, formats=image_formats()) as opened:
                opened.load()
                return to_rgb(turn_upright(opened))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image, or of an unsupported format") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Pillow's decoders raise almost any exception for a corrupt file
        message = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"cannot be read: {message}") from None


def turn_upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # only the EXIF data are broken
        orientation = None
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image: Image.Image) -> Pixels:
    """Converts an image of any mode to (H, W, 3) uint8; `BadImage` if its colours are unknown."""
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"pixel values {values.min()} to {values.max()} do not fit 16 bits")
        # rounds to nearest; there are no ties, because 257 is odd
        grey = ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise BadImage("has floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def read_image(path: Path) -> Pixels:
    """Decodes an image file that the user named, as `decode_image` does.

    Raises:
        UserError: `decode_image` raises `BadImage`.
    """
    try:
        return decode_image(path)
    except BadImage as reason:
        raise UserError(f"{path}: {reason}") from None


def resize_window(pixels: Pixels, top: int, left: int, height: int, width: int, size: int) -> Pixels:
    """Resizes a window of (H, W, 3) `pixels` to (size, size, 3) with Pillow's bicubic filter.

    The filter is antialiased where it shrinks. Only the window is resized, so that an image of 1 x 60000 pixels
    costs no more than any other.
    """
    window = pixels[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    return np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC))


def to_model_range(pixels: Tensor) -> Tensor:
    """Converts uint8 in 0..255 to float32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(image: Tensor) -> Tensor:
    """Converts floats in [-1, 1] (clamped) to uint8, rounded to nearest; any shape."""
    return ((image.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def pad_image(image: Pixels, factor: int) -> Tensor:
    """Pads an (H, W, 3) uint8 image to a (1, 3, H', W') uint8 batch.

    The image is mirrored at the bottom and on the right until H' and W' are multiples of `factor`. They are at
    least twice `factor`, because GroupNorm cannot normalise a latent of one pixel.
    """
    height, width = (max(-(-size // factor), 2) * factor - size for size in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="symmetric")
    return torch.from_numpy(padded).permute(2, 0, 1).unsqueeze(0)
