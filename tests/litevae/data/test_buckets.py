import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from litevae.data.buckets import BucketDataset, Buckets, collate_images
from litevae.data.pixels import BadImage
from litevae.latents.batch_queue import BatchQueue

SIZES = [
    (1, 1),
    (1, 4),
    (4, 1),
    (3, 7),
    (40, 160),
    (160, 40),
    (256, 256),
    (480, 640),
    (1080, 1920),
    (1024, 1023),
]
CONFIGURATIONS = [(16, 8), (32, 4), (256, 8), (256, 64), (1024, 64), (768, 16)]


def some_sizes():
    """Generates sizes of images of any shape up to 4:1."""
    draw = random.Random(0)
    for _ in range(500):
        short = draw.randint(1, 3000)
        pair = (short, draw.randint(short, 4 * short))
        yield pair if draw.random() < 0.5 else pair[::-1]


@pytest.mark.parametrize(("size", "step"), CONFIGURATIONS)
def test_sides_are_the_largest_multiples_that_the_shorter_side_or_the_area_allows(size, step):
    for height, width in [*SIZES, *some_sizes()]:
        found = Buckets("shorter", size, step).find(height, width)
        exact = [Fraction(size * side, min(height, width)) for side in (height, width)]
        assert found == tuple(math.floor(side / step) * step for side in exact)
        found = Buckets("area", size, step).find(height, width)
        for side, other, own in zip(found, (width, height), (height, width), strict=True):
            # The exact side is the root of size^2 own / other.
            assert side % step == 0
            assert side**2 * other <= size**2 * own < (side + step) ** 2 * other


@pytest.mark.parametrize("crop", ["shorter", "area"])
@pytest.mark.parametrize(("size", "step"), CONFIGURATIONS)
def test_a_part_of_less_than_a_step_is_cut_off_one_side(crop, size, step):
    for height, width in [*SIZES, *some_sizes()]:
        rows, columns = Buckets(crop, size, step).find(height, width)
        assert Buckets(crop, size, step).find(width, height) == (columns, rows)
        scale = max(Fraction(rows, height), Fraction(columns, width))  # of an image that covers the result
        cut = sorted((scale * height - rows, scale * width - columns))
        assert cut[0] == 0
        assert 0 <= cut[1] < step


@pytest.mark.parametrize(
    ("size", "step", "area", "shorter"), [(256, 8, 97, 193), (1024, 64, 49, 97), (1024, 8, 385, 769)]
)
def test_there_are_as_many_shapes_as_the_guide_says(size, step, area, shorter):
    sides = [(side, 20011) for side in range(20011, 4 * 20011, 3)] + [(1, 1), (4, 1)]
    for crop, count in (("area", area), ("shorter", shorter)):
        buckets = Buckets(crop, size, step)
        assert len({buckets.find(*each) for pair in sides for each in (pair, pair[::-1])}) == count


@pytest.mark.parametrize("crop", ["shorter", "area"])
def test_an_image_of_four_to_one_is_the_longest(crop):
    buckets = Buckets(crop, 64, 8)
    assert buckets.find(100, 400) == ((64, 256) if crop == "shorter" else (32, 128))
    for size in ((100, 401), (401, 100), (1, 5), (1, 60000)):
        with pytest.raises(BadImage, match=f"^{size[1]}x{size[0]} pixels, longer than 4:1$"):
            buckets.find(*size)


@pytest.mark.parametrize("crop", ["shorter", "area"])
@pytest.mark.parametrize(
    "size", [(300, 451), (300, 200), (200, 200), (7, 3), (1, 1), (50, 200), (201, 51), (64, 96)]
)
def test_pixels_are_those_of_pillow(crop, size, whole_image):
    image = data.chelsea()[: size[0], : size[1]]
    for side, step in ((64, 8), (128, 64), (96, 4)):
        expected = whole_image(Image.fromarray(image), crop, side, step)
        # The box of the test's formula may differ by the rounding of a float.
        found = Buckets(crop, side, step).resize(image).astype(int)
        assert np.abs(found - expected).max() <= 1
        assert found.shape == expected.shape
        assert (found != expected).mean() < 0.01


@pytest.mark.parametrize("crop", ["shorter", "area"])
def test_grey_and_unrounded_channels_are_those_of_pillow(crop):
    levels = data.chelsea()[:200, :300].astype(np.float32) * np.float32(0.999)
    buckets = Buckets(crop, 64, 8)
    height, width = buckets.find(200, 300)
    found = buckets.resize(levels)
    assert found.dtype == np.float32
    assert found.shape == (height, width, 3)
    for channel in range(3):
        image = Image.fromarray(levels[..., channel])
        expected = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[..., channel], np.asarray(expected).clip(0, 255))
    grey = levels[..., :1].astype(np.uint8)
    expected = ImageOps.fit(Image.fromarray(grey[..., 0]), (width, height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(buckets.resize(grey)[..., 0], np.asarray(expected))


def test_nothing_but_a_step_is_missing():
    """A ramp shows which part of the image is there."""
    ramp = np.linspace(0, 255, 1000).round().astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (300, 1000, 3)).copy()
    found = Buckets("shorter", 64, 64).resize(image)  # 64 x 213.3 pixels become 64 x 192
    assert found.shape == (64, 192, 3)
    cut = 255 * (1 - 192 / (64 * 1000 / 300)) / 2
    assert abs(found[0, 0, 0] - cut) < 2
    assert abs(255 - found[0, -1, 0] - cut) < 2


def test_an_image_of_the_right_size_is_not_changed():
    image = data.chelsea()[:64, :96]
    for resized in (Buckets("shorter", 64, 8).resize(image), Buckets("area", 64, 8).resize(image[:, :64])):
        np.testing.assert_array_equal(resized, image[:, : resized.shape[1]])


def test_the_description_says_what_must_not_change():
    made = {Buckets(crop, 64, step).description for crop in ("middle", "shorter", "area") for step in (8, 64)}
    assert len(made) == 5  # the step does not matter for middle squares
    assert (
        Buckets("middle", 64, 8).description == "the middle square, resized by Pillow's antialiased bicubic"
    )


def test_a_pinned_batch_is_the_same(given_images, picture, monkeypatch):
    """Memory is pinned for GPUs."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    dataset = BucketDataset(given_images(picture(0, (64, 100)), None), Buckets("area", 64, 8))
    batch = collate_images([dataset[0], dataset[1]])
    for one, other in zip(pin_memory(batch).images(), batch.images(), strict=True):
        assert torch.equal(one, other)
    queue = BatchQueue(2, 64)
    assert queue.add(pin_memory(batch)) == 1
    assert list(queue.waiting) == [(48, 80)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_images_of_any_size(given_images, picture, workers):
    images = [picture(0, (64, 64)), picture(1, (64, 100)), None, picture(3, (300, 64)), picture(4, (128, 64))]
    dataset = BucketDataset(given_images(*images), Buckets("shorter", 64, 8))
    assert len(dataset) == 5
    (batch,) = DataLoader(dataset, 5, collate_fn=collate_images, num_workers=workers)
    assert batch.shapes == [(3, 64, 64), (3, 64, 96), (3, 0, 0), (3, 0, 0), (3, 128, 64)]
    assert batch.errors == {2: "reason 2", 3: "64x300 pixels, longer than 4:1"}
    assert (batch.numbers, batch.labels) == (list(range(5)), [None] * 5)
    for i, found in enumerate(batch.images()):
        assert tuple(found.shape) == batch.shapes[i]
        if i in (0, 4):
            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), images[i])


def test_a_black_square_stands_for_a_bad_one(given_images, picture):
    dataset = BucketDataset(given_images(picture(0, (20, 30)), None), Buckets("middle", 16, 4))
    first, second = (dataset[i] for i in range(2))
    assert first.pixels.shape == second.pixels.shape == (3, 16, 16)
    assert (first.error, second.error) == (None, "reason 1")
    assert torch.count_nonzero(second.pixels) == 0


def test_image_whose_label_cannot_be_read_is_a_bad_image(plain_images, monkeypatch):
    images = plain_images(7)

    def fail(_):
        raise BadImage("cannot be read: No such file or directory")

    monkeypatch.setattr(images, "label", fail)
    image = BucketDataset(images, Buckets("area", 16, 8))[0]
    assert (image.pixels.numel(), image.error) == (0, "cannot be read: No such file or directory")
