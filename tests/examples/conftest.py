"""Fixtures of the tests of `examples/`: the scripts as modules, and images to run them on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tiny runs a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load_example():
    """A function that imports an example by its name, without running its `main`."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def images(tmp_path):
    """A folder with two photographs in two folders, which are their labels."""
    for label, photograph in (("cat", data.chelsea()), ("cup", data.coffee())):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(photograph).save(tmp_path / "images" / label / "photograph.jpg")
    return tmp_path / "images"
