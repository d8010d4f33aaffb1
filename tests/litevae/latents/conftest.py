import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.latents import Settings, encode_images

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def tiny_runs(one_thread):
    """Runs all tests of this folder in one thread."""


@pytest.fixture(scope="session")
def stored():
    """Reads a tensor of all shards of a folder, joined."""
    return lambda folder, name="moments": torch.cat(
        [load_file(path)[name] for path in sorted(folder.glob("*.safetensors"))]
    )


@pytest.fixture(scope="session")
def readable():
    """Lists the files of the readable photographs."""
    return lambda photographs: [path for path in sorted(photographs.glob("*/*.png")) if path.name != "05.png"]


@pytest.fixture(scope="session")
def shaped(tmp_path_factory):
    """Writes images of several shapes: portrait, landscape, square, tiny, 4:1 and 1:4, one too long, and one broken."""
    folder = tmp_path_factory.mktemp("shaped")
    sizes = [(60, 90), (90, 60), (64, 64), (3, 7), (20, 81), (61, 91), (90, 60), (20, 80), (1, 1), (60, 90)]
    sizes += [(90, 59), (160, 40), (60, 90), (33, 57), (90, 60), (100, 101), (59, 90), (250, 200)]
    names = {4: "-long", 8: "-broken"}
    for i, (height, width) in enumerate(sizes):
        path = folder / f"{i:02d}{names.get(i, '')}.png"
        if i == 8:
            path.write_text("no image")
        else:
            Image.fromarray(data.chelsea()[2 * i : 2 * i + height, 9 * i : 9 * i + width]).save(path)
    return folder


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, model_folder, photographs):
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    model, settings = LiteVAE.from_pretrained(model_folder), Settings(SIZE, mirror=True, shard_size=4)
    encode_images(model, open_images(str(photographs)), folder, settings, workers=0, max_bad_fraction=0.1)
    return folder


@pytest.fixture
def folder(encoded, tmp_path):
    """A folder of middle squares, which a test may change."""
    return shutil.copytree(encoded, tmp_path / "latents")


@pytest.fixture(scope="session")
def bucketed(tmp_path_factory, model_folder, shaped):
    """A folder of whole images."""
    folder = tmp_path_factory.mktemp("bucketed") / "latents"
    model, settings = (
        LiteVAE.from_pretrained(model_folder),
        Settings(SIZE, mirror=True, shard_size=7, crop="area"),
    )
    encode_images(model, open_images(str(shaped)), folder, settings, 2, workers=0, max_bad_fraction=0.2)
    return folder


@pytest.fixture
def model(model_folder):
    return LiteVAE.from_pretrained(model_folder)


@pytest.fixture
def encode(model, photographs, tmp_path):
    """Encodes the photographs in batches of two and shards of four."""

    def run(out="latents", images=None, model=model, **options):
        settings = {"size": SIZE, "mirror": True, "shard_size": 4}
        names = [*settings, "precision", "crop", "bucket_step"]
        settings |= {name: options.pop(name) for name in names if name in options}
        images = open_images(str(photographs)) if images is None else images
        options = {"batch_size": 2, "workers": 0, "max_bad_fraction": 0.1} | options
        return encode_images(model, images, tmp_path / out, Settings(**settings), **options)

    return run


@pytest.fixture(scope="session")
def contents():
    """Reads the files of a folder, by their names."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def middle_square():
    """Reads the square that is encoded of an image, (1, 3, SIZE, SIZE) uint8, with Pillow alone."""

    def load(path):
        image = Image.open(path)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]

    return load
