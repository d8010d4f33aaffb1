"""Decoding of image files to uint8 pixels, and conversion between pixels and a model's tensors."""

import io
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from litevae.errors import UserError
from litevae.files import why_missing

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) in sRGB

MAX_PIXELS = "LITEVAE_MAX_IMAGE_PIXELS"  # environment variable

LONGEST_LABEL = 1000  # characters of the name of an image's class

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
    """Decodes an image file, or its content, to upright 8-bit sRGB.

    Greyscale, palette and CMYK images are converted, embedded colour profiles are converted to sRGB, transparent
    images are composited on white, 16-bit values are scaled to 8 bits (not clipped), and the first frame represents
    an animation. The EXIF orientation is applied. Broken EXIF data are ignored, and so are colour profiles that are
    broken or belong to another kind of image.

    Raises:
        BadImage: the file does not exist, is no image, is truncated or corrupt, has more pixels than the
            environment variable LITEVAE_MAX_IMAGE_PIXELS allows (by default Pillow's limit of about 179 million,
            against decompression bombs), or has pixels of unknown colour (floating-point, LAB).
    """
    try:
        if isinstance(file, Path) and not os.path.isfile(file):
            raise BadImage("is a folder, not an image" if file.is_dir() else why_missing(file, "file"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow would warn once per file with unusual metadata
            set_pixel_limit()
            with Image.open(file, formats=image_formats()) as opened:
                scale_transparent_colour(opened)
                colour = wide_transparent_colour(opened)
                opened.load()
                if colour is not None:
                    opened.putalpha(find_other_colours(opened, file, colour))
                return to_rgb(turn_upright(opened))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        reason = str(error).partition(", could be")[0]
        raise BadImage(f"cannot be read: {reason}; {MAX_PIXELS}=N allows N pixels") from None
    except UnidentifiedImageError:
        raise BadImage("not an image, or of an unsupported format") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Pillow's decoders raise almost any exception for a corrupt file
        message = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"cannot be read: {message}") from None


def check_label_length(length: int) -> None:
    """Raises BadImage if the name of an image's class is so long that it cannot be one."""
    if length > LONGEST_LABEL:
        raise BadImage(f"its label must have at most {LONGEST_LABEL:,} characters, got {length:,}")


def turn_upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # only the EXIF data are broken
        orientation = None
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def set_pixel_limit() -> None:
    """Sets Pillow's limit to that of the environment, if there is one; Pillow refuses images of twice its limit."""
    limit = os.environ.get(MAX_PIXELS, "")
    if limit:
        if not limit.isdecimal():
            raise BadImage(f"{MAX_PIXELS} must be a whole number, got {limit!r:.50}")
        Image.MAX_IMAGE_PIXELS = -(-int(limit) // 2)


def scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Converts the transparent grey of a PNG file to 8 bits, which Pillow does only for the pixels."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return
    raw_mode = image.tile[0].args
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[raw_mode]


def wide_transparent_colour(image: ImageFile.ImageFile) -> tuple[int, int, int] | None:
    """Takes the transparent colour out of a PNG file of 16-bit colours, whose pixels Pillow decodes to 8 bits."""
    if image.format != "PNG" or not image.tile or image.tile[0].args != "RGB;16B":
        return None
    return image.info.pop("transparency", None)


def find_other_colours(
    image: Image.Image, file: Path | IO[bytes], colour: tuple[int, int, int]
) -> Image.Image:
    """Returns a mask of the pixels that do not have a 16-bit colour.

    Args:
        image: the upper bytes of the pixels.
        file: the PNG file, of which the lower bytes are decoded.
        colour: the colour.
    """
    if not isinstance(file, Path):
        file.seek(0)
    with Image.open(file, formats=["PNG"]) as lower:
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # Pillow takes the second byte of each value
        upper_bytes, lower_bytes = np.asarray(image), np.asarray(lower)
    return Image.fromarray((upper_bytes.astype(np.int32) * 256 + lower_bytes != colour).any(-1))


def to_rgb(image: Image.Image) -> Pixels:
    """Converts an image of any mode to (H, W, 3) uint8 in sRGB; `BadImage` if its colours are unknown."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"pixel values {values.min()} to {values.max()} do not fit 16 bits")
        # rounds to nearest; there are no ties, because 257 is odd
        grey = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(values != image.info["transparency"]))
        image = grey
    if image.mode == "F":
        raise BadImage("has floating-point pixels of unknown range: convert it to 8 or 16 bits")
    alpha = None
    if image.has_transparency_data:
        # Pillow does not convert La, whose grey is multiplied with the transparency, to RGBA.
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    image = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts an image without transparency to RGB in sRGB, by its ICC profile if that fits and is not sRGB's."""
    for mode, modes in (("L", ("1", "L")), ("CMYK", ("CMYK",)), ("RGB", ("RGB", "P"))):
        if image.mode in modes and (transform := transform_to_srgb(profile, mode)):
            converted: Image.Image = transform.apply(image.convert(mode))
            return converted
    return image.convert("RGB")


@lru_cache(maxsize=32)
def transform_to_srgb(profile: bytes, mode: Literal["L", "RGB", "CMYK"]) -> ImageCms.ImageCmsTransform | None:
    """Builds the transform from an ICC profile to sRGB.

    Args:
        profile: content of the profile.
        mode: Pillow's mode of the images.

    Returns:
        The transform. None if the profile is broken or is for images of another mode, or if no colour changes by
        more than one level: most files embed sRGB's own profile, and such images keep their values.
    """
    try:
        # The rendering intent is perceptual, Pillow's default.
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), axis=-1).reshape(1, -1, len(mode))
    probe = Image.fromarray(colours.squeeze(-1) if mode == "L" else colours)
    change = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return transform if np.abs(change).max() > 1 else None


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


def as_batch(image: Pixels) -> Tensor:
    """Returns an (H, W, 3) uint8 image as a (1, 3, H, W) uint8 batch, which shares its memory."""
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)


def pad_image(image: Pixels, factor: int) -> Tensor:
    """Pads an (H, W, 3) uint8 image to a (1, 3, H', W') uint8 batch.

    The image is mirrored at the bottom and on the right until H' and W' are multiples of `factor`. They are at
    least twice `factor`, because GroupNorm cannot normalise a latent of one pixel.
    """
    height, width = (max(-(-size // factor), 2) * factor - size for size in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="symmetric")
    return as_batch(padded)
