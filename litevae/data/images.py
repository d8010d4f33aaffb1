"""Decoding of image files to pixels."""

import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from litevae.data.arrays import is_npy, read_npy
from litevae.data.pixels import RGB, BadImage, PixelFormat, Pixels, Values
from litevae.errors import UserError
from litevae.files import why_missing

MAX_PIXELS = "LITEVAE_MAX_IMAGE_PIXELS"  # environment variable

EIGHT_BITS = ("L", "RGB", "RGBA")  # Pillow's modes of as many bits per channel
VALUE_MODES = (*EIGHT_BITS, "I", "I;16", "I;16B", "F")

BITS_PER_SAMPLE, PLANAR, SAMPLE_FORMAT = 258, 284, 339  # TIFF tags
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats
TIFF_SAMPLES = {  # by Pillow's mode, the (bits, sample format) that it reads unchanged
    **dict.fromkeys(EIGHT_BITS, ((8, UNSIGNED),)),
    **dict.fromkeys(("I;16", "I;16B"), ((16, UNSIGNED),)),
    "I": ((16, SIGNED), (32, SIGNED)),
    "F": ((32, FLOAT),),
}

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


@cache
def image_formats() -> list[str]:
    """Returns Pillow's names of the raster formats to decode, limited to those that this build supports.

    Pillow recognises a format by the content, whatever the file's name; for EPS it would start Ghostscript.
    """
    Image.init()
    known = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    return [name for name in known if name in Image.OPEN]


def decode_image(file: Path | IO[bytes], pixel_format: PixelFormat = RGB) -> Pixels:
    """Decodes an image file, or its content, to upright pixels.

    Without a range of values, the pixels are 8-bit sRGB, or the grey (Pillow's L, 0.299 R + 0.587 G + 0.114 B) or RGBA
    of it. Greyscale, palette and CMYK images are converted, embedded colour profiles are converted to sRGB,
    transparent images are composited on white unless there are 4 channels, 16-bit values are scaled to 8 bits (not
    clipped), and the first frame represents an animation. The EXIF orientation is applied. Broken EXIF data are
    ignored, and so are colour profiles that are broken or belong to another kind of image.

    With a range, they are the values that `read_values` returns, mapped from the range to 0..255 in float32.

    Raises:
        BadImage: the file does not exist, is no image, is truncated or corrupt, has more pixels than the
            environment variable LITEVAE_MAX_IMAGE_PIXELS allows (by default Pillow's limit of about 179 million,
            against decompression bombs), has pixels of unknown colour (floating-point, LAB), or is a TIFF whose planes
            Pillow does not decode. With a range:
            `read_values` raised it, the number of channels is another, or a value is outside the range or not finite.
    """
    with explaining_failures(file):
        if pixel_format.value_range is not None:
            return pixel_format.to_levels(read_values(file))
        with open_picture(file) as opened:
            check_planes(opened)
            scale_transparent_colour(opened)
            colour = wide_transparent_colour(opened)
            opened.load()
            if colour is not None:
                opened.putalpha(find_other_colours(opened, file, colour))
            return to_colours(turn_upright(opened), pixel_format.channels)


def read_values(file: Path | IO[bytes]) -> Values:
    """Reads the numbers that a .npy, PNG or TIFF file holds, as they are stored, in the file's dtype.

    The signed 16-bit integers of a TIFF are read as int32, because Pillow has no mode for them.

    Colour profiles and transparent colours are ignored. The EXIF orientation is applied.

    Returns:
        An array (H, W) or (H, W, C) of integers or floats.

    Raises:
        BadImage: the file is no such file, is truncated or corrupt, has more pixels than `decode_image` takes, has a
            palette or several pages, or has numbers that Pillow cannot read unchanged, such as RGB of 16 bits.
    """
    with explaining_failures(file), open_bytes(file) as opened:
        if is_npy(opened):
            return read_npy(opened, 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize))
        try:
            image = Image.open(opened, formats=["PNG", "TIFF"])
        except UnidentifiedImageError:
            raise BadImage(
                "is no file of values that can be read: with a range of values, images are .npy, PNG or TIFF files"
            ) from None
        with image:
            check_values(image)
            image.load()
            return np.asarray(turn_upright(image))


def check_values(image: ImageFile.ImageFile) -> None:
    """Raises BadImage unless Pillow reads all numbers of a PNG or TIFF file as they are stored."""
    if (pages := getattr(image, "n_frames", 1)) > 1:
        raise BadImage(
            f"has {pages} {'pages' if image.format == 'TIFF' else 'frames'}: store them as single images"
        )
    mode = image.mode
    raw = {args if isinstance(args := part.args or "", str) else args[0] for part in image.tile}
    if raw == {"L;I"}:
        raise BadImage("is grey whose 0 is white, which Pillow inverts: store it with 0 as black")
    if mode not in VALUE_MODES or (mode in EIGHT_BITS and not raw <= {mode, *mode}):
        stored = mode if raw == {mode} else f"{mode} ({', '.join(sorted(map(str, raw)))})"
        raise BadImage(
            f"has pixels of Pillow's mode {stored}: with a range of values, images are grey of 8, 16 or 32 "
            "bits, RGB or RGBA of 8 bits, or .npy arrays"
        )
    if image.format == "TIFF":
        tags = tiff_tags(image)
        bits, kinds = set(tags.get(BITS_PER_SAMPLE, (1,))), set(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
        if (bits, kinds) not in [({size}, {kind}) for size, kind in TIFF_SAMPLES[mode]]:
            names = {UNSIGNED: "unsigned integers", SIGNED: "signed integers", FLOAT: "floats"}
            found = " and ".join(names.get(kind, "unknown numbers") for kind in sorted(kinds))
            raise BadImage(
                f"is a TIFF of {found} of {' and '.join(map(str, sorted(bits)))} bits in Pillow's mode {mode}, which "
                "Pillow would change: store it as .npy"
            )
    compressed = any(part.codec_name == "libtiff" for part in image.tile)
    if compressed and mode in ("I", "F") and any("B" in each for each in raw):
        raise BadImage(
            "is a compressed big-endian TIFF of signed or 32-bit values, whose bytes Pillow would swap"
        )


def tiff_tags(image: ImageFile.ImageFile) -> Mapping[int, Any]:
    """Returns the tags of the TIFF file's page; their values are tuples, or a number for a few of one value."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def open_picture(file: Path | IO[bytes]) -> ImageFile.ImageFile:
    """Opens an image of 8 bits; `BadImage` names the setting that an array needs."""
    try:
        return Image.open(file, formats=image_formats())
    except UnidentifiedImageError:
        with open_bytes(file) as opened:
            if is_npy(opened):
                raise BadImage("is an .npy array: only a model with data.value_range takes arrays") from None
        raise


def open_bytes(file: Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """Opens a file, or goes to the beginning of its content, which stays open."""
    if isinstance(file, Path):
        return file.open("rb")
    file.seek(0)
    return nullcontext(file)


def check_planes(image: ImageFile.ImageFile) -> None:
    """Raises BadImage for a TIFF with a plane per channel of more than 8 bits, which Pillow decodes as 8 bits."""
    tags = tiff_tags(image)
    planes = tags.get(PLANAR) == 2 and any(part.codec_name == "raw" for part in image.tile)
    if planes and (bits := max(tags.get(BITS_PER_SAMPLE, (1,)))) > 8:
        raise BadImage(
            f"is an uncompressed TIFF with a plane of {bits} bits per channel, which Pillow does not decode: store the "
            "channels interleaved"
        )


def write_values(path: Path, values: Values) -> None:
    """Writes numbers (H, W) or (H, W, C) to a new .npy, PNG or TIFF file, in their dtype.

    PNG takes uint8 and, for grey images, uint16; TIFF also int32 and float32 for grey images.
    """
    if path.suffix == ".npy":
        np.save(path, values, allow_pickle=False)
    else:
        Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values).save(path)


@contextmanager
def explaining_failures(file: Path | IO[bytes]) -> Iterator[None]:
    """Turns whatever the decoder of an image file raises into `BadImage`, with the reason."""
    try:
        if isinstance(file, Path) and not os.path.isfile(file):
            raise BadImage("is a folder, not an image" if file.is_dir() else why_missing(file, "file"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow would warn once per file with unusual metadata
            set_pixel_limit()
            yield
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
    with open_bytes(file) as content, Image.open(content, formats=["PNG"]) as lower:
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # Pillow takes the second byte of each value
        upper_bytes, lower_bytes = np.asarray(image), np.asarray(lower)
    return Image.fromarray((upper_bytes.astype(np.int32) * 256 + lower_bytes != colour).any(-1))


def to_colours(image: Image.Image, channels: int = 3) -> Pixels:
    """Converts an image of any mode to (H, W, C) uint8 in sRGB, or the grey or RGBA of it.

    Raises:
        BadImage: the image's colours are unknown.
    """
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
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return convert(np.asarray(image), channels)


def convert(pixels: Pixels, channels: int) -> Pixels:
    """Converts (H, W, 3) or (H, W, 4) uint8 pixels to grey, RGB or RGBA: (H, W, channels) uint8."""
    if pixels.shape[2] == channels:
        return pixels
    converted = np.asarray(Image.fromarray(pixels).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return converted[..., None] if channels == 1 else converted


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


def read_image(path: Path, pixel_format: PixelFormat = RGB) -> Pixels:
    """Decodes an image file that the user named, as `decode_image` does.

    Raises:
        UserError: `decode_image` raises `BadImage`.
    """
    try:
        return decode_image(path, pixel_format)
    except BadImage as reason:
        raise UserError(f"{path}: {reason}") from None
