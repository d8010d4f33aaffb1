import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from skimage import data

from litevae.data.images import decode_image, read_image, read_values, write_values
from litevae.data.pixels import BadImage, PixelFormat
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


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_grey_is_pillows(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / "x.png")
    expected = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", PixelFormat(1)), expected[..., None])


def test_grey_of_a_transparent_image_is_that_of_the_image_on_white(tmp_path):
    image = Image.fromarray(np.dstack([RGB, np.full(RGB.shape[:2], 128, np.uint8)]))
    image.save(tmp_path / "x.png")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", PixelFormat(1))[..., 0], white.convert("L"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB"])
def test_rgba_keeps_the_colours_of_transparent_pixels(tmp_path, mode):
    alpha = np.arange(RGB[..., 0].size).reshape(RGB.shape[:2]).astype(np.uint8)
    image = Image.fromarray(np.dstack([RGB, alpha])).convert(mode)
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", PixelFormat(4)), image.convert("RGBA"))


DEEP = np.random.default_rng(0).integers(0, 65536, (9, 14), dtype=np.uint16)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values_are_read_as_they_are_stored(tmp_path, name, dtype):
    values = DEEP.astype(dtype)
    write_values(tmp_path / name, values)
    found = read_values(tmp_path / name)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
    pixels = read_image(tmp_path / name, PixelFormat(1, (0, 65535)))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[..., 0], values / 257, rtol=2**-23)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", ">i2", "<i4", ">i4", "<f4", ">f4"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_of_another_writer(tmp_path, dtype, compression):
    values = DEEP.astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", values, byteorder=dtype[0], compression=compression)
    if compression and dtype in (">i2", ">i4", ">f4"):
        with pytest.raises(BadImage, match="compressed big-endian TIFF"):
            read_values(tmp_path / "x.tif")
        return
    np.testing.assert_array_equal(read_values(tmp_path / "x.tif"), values)


def test_colours_with_a_range_are_read_without_their_profile(tmp_path):
    image = Image.fromarray(RGB)
    image.save(
        tmp_path / "x.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    )
    pixels = read_image(tmp_path / "x.png", PixelFormat(3, (0, 255)))
    np.testing.assert_array_equal(pixels, RGB.astype(np.float32))


def test_values_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_values(tmp_path / "x.png"), np.rot90(DEEP, -1))


def rgb_of_16_bits(path):
    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(8 * (1 + 8 * 6)))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (rgb_of_16_bits, r"Pillow's mode RGB \(RGB;16B\): with a range of values, images are grey"),
        (lambda path: Image.fromarray(RGB).convert("P").save(path), "Pillow's mode P"),
        (lambda path: Image.fromarray(RGB).convert("1").save(path), "Pillow's mode 1"),
        (lambda path: Image.fromarray(RGB).save(path), "has 3 channels, and the model takes 1"),
        (lambda path: Image.fromarray(RGB).save(path, "JPEG"), "images are .npy, PNG or TIFF files"),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "cannot be read"),
        (lambda path: path.mkdir(), "is a folder"),
    ],
)
def test_files_that_hold_no_such_values(tmp_path, write, reason):
    write(tmp_path / "x.png")
    with pytest.raises(UserError, match=reason) as caught:
        read_image(tmp_path / "x.png", PixelFormat(1, (0, 65535)))
    assert "\n" not in str(caught.value)


def test_tiff_of_16_bits_in_colour_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.dstack([DEEP] * 3), photometric="rgb")
    with pytest.raises(BadImage):
        read_values(tmp_path / "x.tif")


@pytest.mark.parametrize("name", ["x.npy", "x.png"])
def test_the_limit_of_pixels_holds_for_values(tmp_path, monkeypatch, name):
    write_values(tmp_path / name, DEEP)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv("LITEVAE_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(BadImage, match="LITEVAE_MAX_IMAGE_PIXELS=N allows N pixels"):
        read_values(tmp_path / name)
    monkeypatch.setenv("LITEVAE_MAX_IMAGE_PIXELS", "126")
    assert read_values(tmp_path / name).shape == DEEP.shape
