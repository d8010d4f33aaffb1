import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.cli import main

SIZE = 32


@pytest.fixture
def litevae(capsys):
    """A function that runs a command, which must succeed, and returns its output."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert status == 0, errors
        return output

    return run


@pytest.fixture
def fails(capsys):
    """A function that runs a command, which must fail, and returns its one-line message."""

    def run(*arguments, status=2):
        assert main([str(argument) for argument in arguments]) == status
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("litevae: error: ")
        assert errors.count("\n") == 1, errors
        return errors

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    LiteVAE.from_preset(
        "litevae-s", latent_channels=12, block_out_channels=(32, 32, 32, 32), layers_per_block=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model():
    """An untrained model for images of 32 pixels."""
    torch.manual_seed(0)
    return LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, sample_size=SIZE
    ).eval()


@pytest.fixture
def tiny_folder(tiny_model, tmp_path):
    """The folder of `tiny_model`."""
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A folder with 8 squares of 32 pixels, which are not resized, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("squares")
    for i in range(8):
        pixels = data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE]
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "bad.png").write_text("not an image")
    return folder


@pytest.fixture(scope="session")
def square_pixels(squares):
    """The pixels of the squares, (8, 32, 32, 3) uint8."""
    return np.stack([np.asarray(Image.open(squares / f"{i}.png")) for i in range(8)])
