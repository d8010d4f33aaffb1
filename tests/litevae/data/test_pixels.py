import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torchvision.transforms import functional

from litevae.data.pixels import (
    BadImage,
    PixelFormat,
    pad_image,
    resize_window,
    to_model_range,
    to_picture,
    to_pixels,
)

RGB = data.chelsea()[:31, :45]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2,), "channels must be 1, 3 or 4, got 2"),
        ((1, (5, 5)), r"value_range must be two numbers, the lower first, such as \[0,65535\], got \[5, 5\]"),
        ((1, (5, 1)), "the lower first"),
        ((1, (0, float("inf"))), "value_range must be"),
        ((1, (float("nan"), 1)), "value_range must be"),
        ((1, (0, 1, 2)), "value_range must be"),
        ((1, 5), "value_range must be two numbers.* got 5"),
    ],
)
def test_formats_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        PixelFormat(*arguments)


def test_lists_and_tuples_are_the_same_range():
    assert PixelFormat(1, [0, 1]) == PixelFormat(1, (0, 1))
    assert hash(PixelFormat(1, [0, 1])) == hash(PixelFormat(1, (0, 1)))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (PixelFormat(), "RGB of 8 bits"),
        (PixelFormat(1), "grey of 8 bits"),
        (PixelFormat(4), "RGBA of 8 bits"),
        (PixelFormat(1, (0, 4095)), "values from 0 to 4095, 1 channel"),
        (PixelFormat(3, (-0.5, 1)), "values from -0.5 to 1, 3 channels"),
    ],
)
def test_formats_in_words(images, words):
    assert str(images) == words


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float16, np.float32, np.float64]
)
def test_values_are_mapped_linearly(dtype):
    low, high = (0, 200) if dtype == np.uint8 else (-100, 1500)
    low = max(low, 0) if np.dtype(dtype).kind == "u" else low
    values = np.linspace(low, high, 120).astype(dtype).reshape(10, 12)
    levels = PixelFormat(1, (low, high)).to_levels(values)
    assert levels.dtype == np.float32
    assert levels.shape == (10, 12, 1)
    expected = np.interp(values.astype(np.float64), (low, high), (-1, 1))
    found = to_model_range(torch.from_numpy(levels[..., 0]))
    # A level is rounded to float32 and so is its quotient: half a unit of 256 and of 2, and the latter of 1.
    assert np.abs(found.numpy() - expected).max() <= (2**-17 / 127.5) + 2**-24 + 2**-24


def test_every_16_bit_value_survives_the_way_to_the_model_and_back():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    images = PixelFormat(1, (0, 65535))
    levels = to_pixels(to_model_range(torch.from_numpy(images.to_levels(values))), torch.float32)
    restored = images.restore(levels.numpy(), values)
    assert restored.dtype == np.uint16
    np.testing.assert_array_equal(restored, values)


def test_restored_integers_stay_within_their_dtype():
    images = PixelFormat(1, (-10, 300))
    ends = np.array([0, 255], np.float32).reshape(1, 2, 1)
    assert images.restore(ends, np.zeros((1, 2), np.uint8)).tolist() == [[0, 255]]
    assert images.restore(ends, np.zeros((1, 2, 1), ">f4")).tolist() == [[[-10], [300]]]
    wide = PixelFormat(1, (-1e20, 1e20)).restore(ends, np.zeros((1, 2), np.int64))
    assert wide.tolist() == [[-(2**53), 2**53]]


def test_ends_of_the_range_in_the_dtype_of_the_file():
    values = np.array([[0.1, 0.7]], np.float32)  # float32's 0.1 is above 0.1
    assert PixelFormat(1, (-0.1, 0.1)).to_levels(values[:, :1]).max() == 255
    assert PixelFormat(1, (0.7, 1.0)).to_levels(values[:, 1:]).min() == 0  # and its 0.7 below 0.7


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[-1.0, 2.0]]), "has values from -1 to 2, outside the range from 0 to 1"),
        (np.array([[0, 256]], np.uint16), "has values from 0 to 256, outside the range from 0 to 1"),
        (np.array([[0.0, np.nan]]), "has values that are infinite or NaN"),
        (np.array([[0.0, np.inf]]), "has values that are infinite or NaN"),
        (np.zeros((2, 2, 3)), "has 3 channels, and the model takes 1"),
        (np.array([[0, 2**63 - 1]]), r"has integers beyond 2\^53"),
        (np.array([[-(2**63), 0]]), r"has integers beyond 2\^53"),
        (np.array([[2**64 - 1]], np.uint64), r"has integers beyond 2\^53"),
    ],
)
def test_values_that_are_not_in_the_format(values, reason):
    with pytest.raises(BadImage, match=reason):
        PixelFormat(1, (0, 1)).to_levels(values)


def test_grey_is_resized_as_pillow_resizes_it():
    grey = Image.fromarray(RGB).convert("L").crop((0, 0, 31, 31))
    expected = np.asarray(grey.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        resize_window(np.asarray(grey)[..., None], 0, 0, 31, 31, 16)[..., 0], expected
    )


def test_colours_of_transparent_pixels_do_not_show_at_edges():
    image = np.zeros((32, 32, 4), np.uint8)
    image[:, :13] = (255, 0, 0, 255)
    image[:, 13:] = (0, 255, 0, 0)
    resized = resize_window(image, 0, 0, 32, 32, 16)
    visible = resized[resized[..., 3] > 0]
    assert (visible[:, :3] == (255, 0, 0)).all()
    assert ((visible[:, 3] > 0) & (visible[:, 3] < 255)).any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_values_are_resized_without_rounding(channels):
    values = np.random.default_rng(0).uniform(0, 255, (40, 40, channels)).astype(np.float32)
    found = resize_window(values, 0, 0, 40, 40, 16)
    image = torch.from_numpy(values).double().permute(2, 0, 1)[None]
    expected = F.interpolate(image, size=16, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    # Each of Pillow's two passes rounds levels below 512 to float32.
    np.testing.assert_allclose(found, expected.clamp(0, 255).float(), atol=4 * 2**-16)
    assert found.dtype == np.float32
    assert (found != np.rint(found)).any()


def test_resized_values_stay_within_the_range():
    values = np.zeros((40, 40, 1), np.float32)
    values[:, 20:] = 255  # a bicubic filter would overshoot
    resized = resize_window(values, 0, 0, 40, 40, 100)
    assert (resized.min(), resized.max()) == (0, 255)


def test_pictures_for_the_eye():
    grey = np.array([[[0.4], [254.6]]], np.float32)
    assert to_picture(grey).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert to_picture(RGB) is RGB
    assert to_picture(np.full((2, 2, 4), 7.2, np.float32)).dtype == np.uint8
