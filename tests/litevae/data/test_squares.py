import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torchvision.transforms import InterpolationMode, functional

from litevae.data.config import DataConfig
from litevae.data.pixels import BadImage
from litevae.data.sources import TRAINING_PHOTOGRAPHS
from litevae.data.squares import SquareDataset, load_validation, middle_square, open_validation
from litevae.errors import UserError

CHELSEA = data.chelsea()


def test_validation_is_the_middle_of_torchvisions_resized_image(given_images):
    image = CHELSEA[:200, :300]
    ((name, square),) = load_validation(given_images(image), 100, 64).images
    assert name == "image 0"
    resized = functional.resize(Image.fromarray(image), [100], InterpolationMode.BICUBIC, antialias=True)
    expected = np.asarray(functional.center_crop(resized, [100]))
    # Near the left and right edges, the filter (4 source pixels at 2:1) reaches outside the square.
    np.testing.assert_array_equal(square[:, 2:-2], expected[:, 2:-2])
    assert square.shape == expected.shape


@pytest.mark.parametrize(
    ("count", "expected"), [(100, range(10)), (10, range(10)), (5, [0, 2, 4, 6, 8]), (1, [0])]
)
def test_validation_takes_images_at_equal_distances(count, expected, plain_images):
    result = load_validation(plain_images(*range(10)), 8, count)
    assert [pixels[0, 0, 0] for _, pixels in result.images] == list(expected)
    assert result.bad == []


def test_bad_images_are_left_out_of_the_validation(plain_images):
    result = load_validation(plain_images(0, None, 2), 8, 3)
    assert [name for name, _ in result.images] == ["image 0", "image 2"]
    assert result.bad == [("image 1", "reason 1")]
    with pytest.raises(UserError, match="none of the 2 images to validate on can be read; image 0: reason 0"):
        load_validation(plain_images(None, None), 8, 3)
    assert load_validation(plain_images(None, None), 8, 3, at_least=0).images == []


def test_validation_of_the_demo_is_chelsea(tmp_path):
    for config in (DataConfig(), DataConfig(train="elsewhere", validation="demo")):
        source = open_validation(config)
        assert [source.name(i) for i in range(len(source))] == ["chelsea"]
        np.testing.assert_array_equal(source.load(0), CHELSEA)
        assert source.name(0) not in TRAINING_PHOTOGRAPHS
    assert open_validation(DataConfig(train="elsewhere")) is None
    Image.fromarray(CHELSEA).save(tmp_path / "x.png")
    assert len(open_validation(DataConfig(validation=str(tmp_path)))) == 1
    with pytest.raises(UserError, match="no such file or folder"):
        open_validation(DataConfig(validation=str(tmp_path / "nowhere")))


def test_a_batch_holds_the_squares_of_the_numbers_asked_for(plain_images):
    squares = SquareDataset(plain_images(*range(3), None, *range(4, 10)), 8, count=5, numbers=range(1, 5, 2))
    assert (squares.count, len(squares)) == (5, 2)
    assert [squares.name(number) for number in squares.numbers] == ["image 2", "image 6"]
    batch = squares.collate([squares[i] for i in range(2)])
    assert (batch.numbers, batch.labels, batch.errors) == ([1, 3], [None, None], {})
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.pixels[:, 0, 0, 0].tolist() == [2, 6]


def test_unreadable_images_are_black_in_a_batch(plain_images):
    squares = SquareDataset(plain_images(7, None, 9), 8)
    batch = squares.collate([squares[i] for i in range(3)])
    assert batch.errors == {1: "reason 1"}
    assert batch.pixels[:, 0, 0, 0].tolist() == [7, 0, 9]
    numbers, pixels = batch.readable
    assert numbers == [0, 2]
    assert torch.equal(pixels, batch.pixels[[0, 2]])


def test_image_whose_label_cannot_be_read_is_a_bad_image(plain_images, monkeypatch):
    images = plain_images(7)

    def fail(_):
        raise BadImage("cannot be read: No such file or directory")

    monkeypatch.setattr(images, "label", fail)
    square = SquareDataset(images, 8, labels=True)[0]
    assert (square.pixels, square.error) == (None, "cannot be read: No such file or directory")
    measured = SquareDataset(images, 8)[0]  # reads no label
    assert (measured.error, measured.label) == (None, None)


def test_middle_square_of_wide_and_high_images():
    rows, columns = np.mgrid[:9, :20].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)
    np.testing.assert_array_equal(middle_square(image, 9), image[:, 5:14])
    np.testing.assert_array_equal(
        middle_square(image.transpose(1, 0, 2), 9), image[:, 5:14].transpose(1, 0, 2)
    )
