"""Images as uint8 pixels: reading files, and the way to a model's tensors and back."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from litevae.errors import UserError

Pixels = npt.NDArray[np.uint8]  # (H, W, 3); embedded colour profiles are ignored


def read_image(path: Path) -> Pixels:
    """An image file as 8-bit RGB, turned upright.

    Greyscale, palette and CMYK images are converted; transparent ones are laid on white; 16 bits are scaled
    to 8 (not clipped); of an animation this is the first frame; the EXIF orientation is applied.

    Raises:
        UserError: no such file, not an image, broken, too large to be one, or of floating-point pixels.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or of a kind that Pillow cannot read") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise UserError(f"{path}: cannot be read: {error}") from None

    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip it
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: pixel values {values.min()} to {values.max()} do not fit 16 bits")
        grey = np.rint(values / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise UserError(f"{path}: has floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(image: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8, rounded to the nearest; any shape."""
    return ((image.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_batch(image: Pixels, factor: int) -> Tensor:
    """(H, W, 3) uint8 as a (1, 3, H', W') batch in [-1, 1].

    It is mirrored at the bottom and on the right until H' and W' are multiples of `factor`, and at least
    twice that: a latent of one pixel is nothing that GroupNorm can normalise.
    """
    height, width = (max(-(-size // factor), 2) * factor - size for size in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="symmetric")
    return to_model_range(torch.from_numpy(padded).permute(2, 0, 1).unsqueeze(0))
