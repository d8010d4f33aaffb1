"""Transparent colours, colour profiles and the limit on the number of pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from litevae.data.images import decode_image, to_colours
from litevae.data.pixels import BadImage

WHITE = [255, 255, 255]


def png(depth, colour_type, pixels, transparency=None, palette=None):
    """Makes a PNG file of two pixels, as the specification says (https://www.w3.org/TR/png-3)."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"tRNS", transparency)] if transparency is not None else []
    chunks += [(b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
COLOURS = bytes([9, 9, 9, 100, 150, 200])


@pytest.mark.parametrize(
    ("content", "second"),
    [
        (png(1, GREY, b"\x40", words(0)), WHITE),
        (png(1, GREY, b"\x80", words(1)), [0, 0, 0]),
        (png(2, GREY, b"\x60", words(1)), [170] * 3),
        (png(4, GREY, b"\x37", words(3)), [119] * 3),
        (png(8, GREY, b"\x05\x06", words(5)), [6] * 3),
        (png(16, GREY, words(0, 257), words(0)), [1] * 3),
        (png(16, GREY, words(1000, 1001), words(1000)), [4] * 3),
        (png(8, RGB, bytes([1, 2, 3, 1, 2, 4]), words(1, 2, 3)), [1, 2, 4]),
        (png(16, RGB, words(256, 512, 768, 256, 512, 1024), words(256, 512, 768)), [1, 2, 4]),
        (png(16, RGB, words(256, 512, 768, 256, 512, 769), words(256, 512, 768)), [1, 2, 3]),
        (png(16, RGB, words(0, 0, 255, 255, 255, 254), words(0, 0, 255)), [0, 0, 0]),
        (png(1, PALETTE, b"\x40", b"\0", COLOURS), [100, 150, 200]),
        (png(4, PALETTE, b"\x01", b"\0", COLOURS), [100, 150, 200]),
        (png(8, PALETTE, b"\0\1", b"\0\xff", COLOURS), [100, 150, 200]),
        (png(8, GREY_ALPHA, bytes([0, 0, 7, 255])), [7] * 3),
        (png(16, GREY_ALPHA, words(0, 0, 7 * 257, 65535)), [7] * 3),
        (png(8, RGB_ALPHA, bytes([0, 0, 0, 0, 1, 2, 3, 255])), [1, 2, 3]),
        (png(16, RGB_ALPHA, words(0, 0, 0, 0, 256, 512, 768, 65535)), [1, 2, 3]),
    ],
)
def test_the_first_pixel_is_transparent_and_shows_white(content, second, tmp_path):
    assert decode_image(io.BytesIO(content)).tolist() == [[WHITE, second]]
    (tmp_path / "x.png").write_bytes(content)
    assert decode_image(tmp_path / "x.png").tolist() == [[WHITE, second]]


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_half_transparent_black_is_grey_in_every_mode(mode):
    image = Image.new(mode, (1, 1), (0,) * (len(mode) - 1) + (128,))  # PA: the palette is grey
    assert to_colours(image).tolist() == [[[127] * 3]]


def profile(space, gamma, colorants=()):
    """Makes an ICC profile, version 2.4, of a colour space with a power law and the white of D50.

    Args:
        space: b"RGB " or b"GRAY".
        gamma: exponent of the power law.
        colorants: XYZ of red, green and blue under D50.
    """

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for name, xyz in zip((b"r", b"g", b"b"), colorants, strict=False):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))
        tags[name + b"TRC"] = curve
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags[b"cprt"] = b"text\0\0\0\0x\0\0\0"
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += (
        struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp")
        + bytes(28)
        + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    )
    header += bytes(128 - len(header))
    content = header + table + body
    return struct.pack(">I", len(content)) + content[4:]


# Adobe RGB (1998), section 4.3.5.3, and sRGB as ICC's own profile states it, both under D50
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def encode_srgb(linear):
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.fixture(scope="module")
def colours():
    return np.random.default_rng(0).integers(20, 236, (20, 30, 3), dtype=np.uint8)


def read(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return decode_image(buffer)


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_a_profile_become_srgb(colours, alpha):
    expected = encode_srgb((colours / 255.0) ** 2.2 @ ADOBE @ np.linalg.inv(SRGB))
    image = Image.fromarray(colours)
    if alpha:
        image.putalpha(128)
        expected = 255 + (expected - 255) * 128 / 255
    found = read(image, icc_profile=profile(b"RGB ", 2.2, ADOBE))
    assert np.abs(found - colours.astype(float)).max() > 20
    # Little CMS computes 8-bit images in fixed point with tables; each rounds by about half a level.
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_greys_of_a_profile_become_srgb(dtype):
    grey = np.arange(256, dtype=dtype)[None]
    expected = encode_srgb((grey / 255.0) ** 1.8)[..., None]
    image = Image.fromarray(grey if dtype == np.uint8 else grey * np.uint16(257))
    found = read(image, icc_profile=profile(b"GRAY", 1.8))
    assert np.abs(found - expected).max() <= 2


def test_a_palette_has_the_colours_of_its_profile(colours):
    image = Image.fromarray(colours).quantize(16)
    adobe = profile(b"RGB ", 2.2, ADOBE)
    np.testing.assert_array_equal(
        read(image, icc_profile=adobe), read(image.convert("RGB"), icc_profile=adobe)
    )


@pytest.mark.parametrize(
    "content",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),  # the values stay as they are
        b"no profile",
        profile(b"GRAY", 1.0),  # for another kind of image
        profile(b"RGB ", 2.2, ADOBE)[:200],
    ],
    ids=["srgb", "nonsense", "grey", "cut"],
)
def test_other_profiles_change_nothing(colours, content):
    np.testing.assert_array_equal(read(Image.fromarray(colours), icc_profile=content), colours)


def test_cmyk_is_converted_by_its_profile(colours, monkeypatch):
    """There is no CMYK profile to test with, so that the transform is replaced."""
    image = Image.fromarray(colours).convert("CMYK")

    class Transform:
        def apply(self, source):
            assert source.mode == "CMYK"
            return Image.new("RGB", source.size, (1, 2, 3))

    monkeypatch.setattr(
        "litevae.data.images.transform_to_srgb", lambda _, mode: Transform() if mode == "CMYK" else None
    )
    assert (read(image, format="TIFF", icc_profile=b"x") == (1, 2, 3)).all()


def test_an_image_above_the_limit_names_the_variable_that_raises_it(colours, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        BadImage, match=r"600 pixels\) exceeds limit of 200 pixels; LITEVAE_MAX_IMAGE_PIXELS=N allows"
    ):
        read(Image.fromarray(colours))
    for limit, allowed in (("598", False), ("600", True), ("1e9", False)):
        monkeypatch.setenv("LITEVAE_MAX_IMAGE_PIXELS", limit)
        if allowed:
            np.testing.assert_array_equal(read(Image.fromarray(colours)), colours)
        else:
            with pytest.raises(BadImage, match="LITEVAE_MAX_IMAGE_PIXELS"):
                read(Image.fromarray(colours))
