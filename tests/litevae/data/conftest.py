"""Sources of images for the tests, in memory and on disk."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from litevae.data.pixels import RGB, BadImage
from litevae.data.sources import open_images
from litevae.errors import UserError


class GivenImages:
    """A source of the given pixels; None stands for an image that cannot be read."""

    pixel_format = RGB

    def __init__(self, *pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def name(self, index):
        return f"image {index}"

    def label(self, index):
        return None

    def load(self, index):
        if self.pixels[index] is None:
            raise BadImage(f"reason {index}")
        return self.pixels[index]


@pytest.fixture(scope="session")
def given_images():
    return GivenImages


@pytest.fixture(scope="session")
def plain_images():
    """Makes a source of images of uniform grey levels; None stands for an image that cannot be read."""

    def make(*levels, size=(20, 30)):
        pixels = (None if level is None else np.full((*size, 3), level, np.uint8) for level in levels)
        return GivenImages(*pixels)

    return make


@pytest.fixture(scope="session")
def picture():
    """Makes the pixels of random picture `number`."""

    def make(number, size=(12, 10)):
        return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)

    return make


@pytest.fixture(scope="session")
def png(picture):
    """Makes the PNG file of random picture `number`."""

    def make(number):
        buffer = io.BytesIO()
        Image.fromarray(picture(number)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def write():
    """Writes a file, with its folder."""

    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


@pytest.fixture(scope="session")
def write_tar():
    """Writes a .tar file of (name, content) pairs, with its folder."""

    def write(path, members):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return write


@pytest.fixture(scope="session")
def write_shards(png):
    """Writes 12 random pictures to three shards, as `webdataset` does."""

    def write(folder):
        for shard in range(3):
            writer = webdataset.TarWriter(str(folder / f"train-{shard:03}.tar"))
            for number in range(shard * 4, shard * 4 + 4):
                sample = {"__key__": f"sample{number:05}", "png": png(number), "cls": b"3", "json": b"{}"}
                writer.write(sample)
            writer.close()

    return write


@pytest.fixture(scope="session")
def names():
    """Lists the names of a source's images."""
    return lambda source: [source.name(i) for i in range(len(source))]


@pytest.fixture(scope="session")
def assert_pictures(picture):
    """Checks that a source holds the random pictures of these numbers."""

    def check(source, numbers):
        assert len(source) == len(numbers)
        for i, number in enumerate(numbers):
            np.testing.assert_array_equal(source.load(i), picture(number))

    return check


@pytest.fixture(scope="session")
def refusal():
    """Returns the message with which `open_images` refuses a path, one short line."""

    def refuse(path):
        with pytest.raises(UserError) as caught:
            open_images(str(path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        return str(caught.value)

    return refuse
