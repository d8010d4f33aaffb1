"""Images as uint8 pixels: reading files, and the way to a model's tensors and back."""

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

ORIENTATION = 0x0112  # the EXIF tag, and what brings each of its values upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image without usable pixels. The message is the reason, in one line."""


@cache
def image_formats() -> list[str]:
    """The formats that are read, by Pillow's names: pictures of pixels, as far as this Pillow knows them.

    Whatever the name of a file says, Pillow looks at its content, and for EPS it would start Ghostscript.
    """
    Image.init()
    known = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    return [name for name in known if name in Image.OPEN]


def decode(file: Path | IO[bytes]) -> Pixels:
    """An image file, or its content, as 8-bit RGB, turned upright.

    Greyscale, palette and CMYK images are converted; transparent ones are laid on white; 16 bits are scaled
    to 8 (not clipped); of an animation this is the first frame; the EXIF orientation is applied, and EXIF
    data that are broken are ignored.

    Raises:
        BadImage: no such file, not an image, cut off or broken, above Pillow's limit of about 179 million
            pixels (a decompression bomb), or of pixels whose colour is unknown (floating-point, LAB).
    """
    try:
        if isinstance(file, Path) and not file.is_file():
            raise BadImage("is a folder, not an image" if file.is_dir() else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, once for each of a million files
            with Image.open(file, formats=image_formats()) as opened:
                opened.load()
                return to_rgb(upright(opened))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image, or of a kind that is not read") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        message = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"cannot be read: {message}") from None


def upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the picture is whole, only its EXIF data are not
        orientation = None
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"pixel values {values.min()} to {values.max()} do not fit 16 bits")
        grey = ((values.astype(np.int32) + 128) // 257).astype(np.uint8)  # the nearest; 257 has no halves
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise BadImage("has floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def read_image(path: Path) -> Pixels:
    """`decode` for a file that the user named.

    Raises:
        UserError: what `decode` calls a bad image.
    """
    try:
        return decode(path)
    except BadImage as reason:
        raise UserError(f"{path}: {reason}") from None


def resize_window(pixels: Pixels, top: int, left: int, height: int, width: int, size: int) -> Pixels:
    """The window of (H, W, 3) `pixels` as (size, size, 3): Pillow's bicubic, antialiased where it shrinks.

    Only the window is resized, so that an image of 1 x 60000 pixels costs no more than another.
    """
    window = pixels[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    return np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC))


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(image: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8, rounded to the nearest; any shape."""
    return ((image.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def pad_image(image: Pixels, factor: int) -> Tensor:
    """Pads an (H, W, 3) uint8 image to a (1, 3, H', W') uint8 batch.

    The image is mirrored at the bottom and on the right until H' and W' are multiples of `factor`, and at least
    twice `factor`: GroupNorm cannot normalise a latent of one pixel.
    """
    height, width = (max(-(-size // factor), 2) * factor - size for size in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="symmetric")
    return torch.from_numpy(padded).permute(2, 0, 1).unsqueeze(0)
