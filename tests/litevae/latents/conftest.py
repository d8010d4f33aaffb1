import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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


@pytest.fixture
def model(model_folder):
    return LiteVAE.from_pretrained(model_folder)


@pytest.fixture
def encode(model, photographs, tmp_path):
    """Encodes the photographs in batches of two and shards of four."""

    def run(out="latents", images=None, model=model, **options):
        settings = {"size": SIZE, "mirror": True, "shard_size": 4}
        settings |= {name: options.pop(name) for name in [*settings, "precision"] if name in options}
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
