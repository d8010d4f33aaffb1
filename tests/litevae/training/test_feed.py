"""What a run makes of images that cannot be read, beside its crops."""

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from litevae.errors import UserError
from litevae.training import load_config
from litevae.training.config import list_stages
from litevae.training.feed import Feed


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of images by their grey; None is one that cannot be read."""

    def make(name, *greys):
        folder = tmp_path / name
        folder.mkdir()
        for number, grey in enumerate(greys):
            path = folder / f"{number:02}.png"
            if grey is None:
                path.write_bytes(b"broken")
            else:
                Image.fromarray(np.full((40, 48, 3), grey, np.uint8)).save(path)
        return folder

    return make


def feed(tmp_path, *overrides):
    config = load_config("demo", ["data.size=32", "data.crop=random", f"output_dir={tmp_path}", *overrides])
    return Feed(config, list_stages(config), Accelerator(cpu=True), tmp_path, resuming=False)


def test_training_images_are_shown_where_none_are_held_out(folder, tmp_path):
    images = folder("train", *range(8))
    made = feed(tmp_path, f"data.train={images}")
    assert made.validation == []
    assert [pixels[0, 0, 0] for _, pixels in made.shown] == [0, 2, 4, 6]


def test_broken_images_among_those_shown_stop_no_run(folder, tmp_path):
    images = folder("train", None, 1, None, 3, None, 5, None, 7)  # all that are shown of them
    assert feed(tmp_path, f"data.train={images}").shown == []


def test_broken_validation_images_are_named(folder, tmp_path, capsys):
    validation = folder("validation", 1, None, 3)
    made = feed(tmp_path, f"data.train={folder('train', 1, 2)}", f"data.validation={validation}")
    assert [pixels[0, 0, 0] for _, pixels in made.validation] == [1, 3]
    assert f"1 validation images cannot be read: {validation / '01.png'}" in capsys.readouterr().err


def test_no_validation_image_that_can_be_read(folder, tmp_path):
    validation = folder("validation", None)
    with pytest.raises(UserError, match="none of the 1 images to validate on can be read"):
        feed(tmp_path, f"data.train={folder('train', 1)}", f"data.validation={validation}")
