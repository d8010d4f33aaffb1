import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from litevae.errors import UserError
from litevae.images import read_image, to_batch, to_model_range, to_pixels

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


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned clockwise
    pixels = saved(tmp_path, Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(pixels, np.rot90(RGB, -1))


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


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="cannot be read"):
        saved(tmp_path, Image.fromarray(RGB))


def test_pixels_survive_the_way_to_the_model_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(levels)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(to_pixels(values), levels)
    assert to_pixels(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


@pytest.mark.parametrize("size", [(1, 1), (8, 16), (9, 23), (31, 45)])
def test_batch_is_mirrored_up_to_a_multiple(size):
    image = RGB[: size[0], : size[1]]
    batch = to_batch(image, 8)
    assert batch.shape == (1, 3, *(max(16, -(-side // 8) * 8) for side in size))
    inside = to_pixels(batch)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(inside[: size[0], : size[1]], image)
    if size[0] % 8:
        np.testing.assert_array_equal(inside[size[0], : size[1]], image[-1])
