import numpy as np
import pytest
from PIL import Image
from skimage import data

from litevae.errors import UserError
from litevae.experiments.demo_images import squares_folder


def test_squares_are_cut_from_the_photographs_and_not_resized(tmp_path):
    folder = squares_folder(tmp_path, held_out=True, size=100)
    files = sorted(folder.iterdir())
    rows = [np.concatenate([np.asarray(Image.open(f)) for f in files[i : i + 4]], axis=1) for i in (0, 4, 8)]
    assert np.array_equal(np.concatenate(rows), data.chelsea()[:300, :400])
    others = list(squares_folder(tmp_path, held_out=False, size=64).iterdir())
    assert 200 < len(others) <= 256
    assert not any(file.name.startswith("chelsea") for file in others)


def test_squares_larger_than_the_photographs_are_refused(tmp_path):
    with pytest.raises(UserError, match="squares of 512 pixels are larger than the photographs"):
        squares_folder(tmp_path, held_out=True, size=512)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^cannot write to {tmp_path / 'file'}: Not a directory"):
        squares_folder(tmp_path / "file", held_out=True, size=300)
