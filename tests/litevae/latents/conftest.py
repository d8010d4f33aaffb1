import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.latents import Settings, encode_images

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def tiny_runs(one_thread):
    """All here are."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s",
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder):
    return LiteVAE.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """11 images in three folders, of which one (the sixth) is broken; the others are larger than a crop."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(11):
        path = folder / "abc"[i // 4] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        if i == 5:
            path.write_text("no image")
        else:
            Image.fromarray(data.chelsea()[9 * i : 9 * i + 40 + i, 20 * i : 20 * i + 60 - i]).save(path)
    return folder


@pytest.fixture
def encode(model, photographs, tmp_path):
    """Encodes the photographs, two at a time, in shards of four."""

    def run(out="latents", images=None, model=model, **options):
        settings = {"size": SIZE, "mirror": True, "shard_size": 4}
        settings |= {name: options.pop(name) for name in [*settings, "precision"] if name in options}
        images = open_images(str(photographs)) if images is None else images
        options = {"batch_size": 2, "workers": 0, "max_bad_fraction": 0.1} | options
        return encode_images(model, images, tmp_path / out, Settings(**settings), **options)

    return run


@pytest.fixture(scope="session")
def contents():
    """The files of a folder, by their names."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def middle_square():
    """What is encoded of an image, (1, 3, SIZE, SIZE) uint8, by Pillow alone."""

    def load(path):
        image = Image.open(path)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]

    return load
