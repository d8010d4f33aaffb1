import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from skimage import data
from torchvision.transforms import functional

from litevae.data.images import decode_image, read_image
from litevae.data.pixels import BadImage, pad_image, resize_window, to_model_range, to_pixels
from litevae.errors import UserError

RGB = data.chelsea()[:31, :45]


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name)


def test_rgb_is_read_as_it_is(tmp_path):
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(RGB)), RGB)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "PA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    name = {"CMYK": "x.jpg", "YCbCr": "x.jpg", "PA": "x.tif"}.get(mode, "x.png")
    if mode == "PA":
        image = image.convert("LA")
    pixels = saved(tmp_path, image, name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == RGB.shape


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "P"])
def test_colours_are_kept(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    pixels = saved(tmp_path, image, "x.tif")
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_is_no_negative(tmp_path):
    pixels = saved(tmp_path, Image.fromarray(RGB).convert("CMYK"), "x.jpg", quality=95)
    assert np.abs(pixels.astype(int) - RGB).mean() < 8  # the negative image would differ by 46


def test_16_bit_colour_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 31 * 45 * 3).reshape(31, 45, 3).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb")
    # Pillow keeps the upper byte, at most one level below the nearest
    assert np.abs(read_image(tmp_path / "x.tif") - values / 257).max() <= 1


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name == "x.webp" else {}
    pixels = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert pixels.shape == (30, 20, 3)
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.linspace(0, 65535, 31 * 45).reshape(31, 45).astype(np.uint16)
    pixels = saved(tmp_path, Image.fromarray(values), name)
    np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_transparency_shows_white(tmp_path):
    alpha = np.zeros(RGB.shape[:2], np.uint8)
    alpha[:10] = 255
    pixels = saved(tmp_path, Image.fromarray(np.dstack([RGB, alpha])))
    np.testing.assert_array_equal(pixels[:10], RGB[:10])
    assert (pixels[10:] == 255).all()


def test_transparent_palette_colour_shows_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    pixels = saved(tmp_path, image, transparency=0)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [200, 100, 50]


def test_big_endian_16_bits(tmp_path):
    values = np.linspace(0, 65535, 31 * 45).reshape(31, 45).astype(">u2")
    tifffile.imwrite(tmp_path / "x.tif", values, byteorder=">")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif")[..., 1], np.rint(values / 257))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    pixels = saved(tmp_path, Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(pixels, np.rot90(RGB, -1))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = saved(tmp_path, Image.fromarray(RGB), name, exif=exif)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(pixels, ImageOps.exif_transpose(image).convert("RGB"))
    assert pixels.shape[:2] == ((45, 31) if orientation in (5, 6, 7, 8) else (31, 45))


@pytest.mark.parametrize("exif", [b"", b"nonsense", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\x7f"])
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_broken_exif_leaves_the_pixels(tmp_path, name, exif):
    plain = saved(tmp_path, Image.fromarray(RGB), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            saved(tmp_path, Image.fromarray(RGB), name, exif=b"Exif\0\0" + exif), plain
        )


def broken(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(data.chelsea()).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def text(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    return path


def floating(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.ones((8, 8), np.float32)).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.png", "no such file"),
        (lambda folder: folder, "is a folder"),
        (text, "not an image"),
        (broken, "cannot be read"),
        (floating, "floating-point"),
    ],
)
def test_unreadable_file_is_named(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def png(width, height, content=b""):
    """Makes an 8-bit RGB PNG file whose header states this size."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(content)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"/>'


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, SVG, EPS, b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(BadImage, match="not an image"):
        decode_image(io.BytesIO(content))


@pytest.mark.parametrize("content", [png(100_000, 100_000), png(2**31 - 1, 1)])
def test_decompression_bomb_is_refused(content):
    with pytest.raises(BadImage, match=r"cannot be read.*exceeds limit"):
        decode_image(io.BytesIO(content))


def test_large_image_that_is_no_bomb_raises_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31 * 45 - 1)  # Pillow refuses more than twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(RGB)), RGB)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would block
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    reasons = {"pipe.png": "not a regular file", "link.png": "no such file", "gone.png": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            decode_image(tmp_path / name)
    Image.fromarray(RGB).save(tmp_path / "x.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadImage, match="cannot be read: Permission denied"):
        decode_image(tmp_path / "x.png")


FORMATS = {"JPEG": {}, "PNG": {}, "WEBP": {}, "GIF": {}, "TIFF": {}, "BMP": {}, "JPEG2000": {}}
FORMATS["progressive JPEG"] = {"format": "JPEG", "progressive": True}


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, **{"format": kind, **FORMATS[kind]})
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_file_cut_off_anywhere_is_refused_or_whole(kind):
    content = encoded(kind)
    whole = decode_image(io.BytesIO(content))
    refused = 0
    for cut in np.random.default_rng(0).integers(0, len(content), 50):
        try:
            pixels = decode_image(io.BytesIO(content[:cut]))
        except BadImage as reason:
            assert "\n" not in str(reason)  # noqa: PT017
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, whole)
    assert refused > 40


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_bytes_give_pixels_or_a_bad_image(kind):
    random = np.random.default_rng(0)
    content = np.frombuffer(encoded(kind), np.uint8)
    for _ in range(50):
        broken = content.copy()
        broken[random.integers(0, len(broken), 8)] = random.integers(0, 256, 8)
        try:
            pixels = decode_image(io.BytesIO(broken.tobytes()))
        except BadImage:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.size


@pytest.mark.parametrize("size", [16, 100, 300, 500])
def test_resized_square_is_torchvisions(size):
    image = Image.fromarray(data.chelsea()[:300, :300])
    expected = functional.resize(image, [size, size], functional.InterpolationMode.BICUBIC, antialias=True)
    np.testing.assert_array_equal(resize_window(np.asarray(image), 0, 0, 300, 300, size), expected)


def test_window_of_the_size_is_not_resampled():
    np.testing.assert_array_equal(resize_window(RGB, 3, 5, 20, 20, 20), RGB[3:23, 5:25])


def test_pixels_survive_the_way_to_the_model_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(levels)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(to_pixels(values), levels)
    assert to_pixels(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


@pytest.mark.parametrize("size", [(1, 1), (8, 16), (9, 23), (31, 45)])
def test_batch_is_mirrored_up_to_a_multiple(size):
    image = RGB[: size[0], : size[1]]
    batch = to_model_range(pad_image(image, 8))
    assert batch.shape == (1, 3, *(max(16, -(-side // 8) * 8) for side in size))
    inside = to_pixels(batch)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(inside[: size[0], : size[1]], image)
    if size[0] % 8:
        np.testing.assert_array_equal(inside[size[0], : size[1]], image[-1])
