"""Reconstructions on the disk, read as their users read them."""

import zipfile

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from litevae.data.pixels import PixelFormat
from litevae.errors import UserError
from litevae.evaluation.saved import prepare_folder, saving

PICTURES = torch.arange(5 * 3 * 6 * 4, dtype=torch.uint8).view(5, 3, 6, 4)


def save(target):
    with saving(target, PartialState(cpu=True)) as each:
        each([0, 1, 2], PICTURES[:3])
        each([4, 7], PICTURES[3:].to(memory_format=torch.channels_last))


def test_npz_is_read_by_numpy_and_in_the_way_of_adms_evaluator(tmp_path):
    save(tmp_path / "all.npz")
    expected = PICTURES.permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "all.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], expected)
    # ADM's evaluator.py reads the header and then batches of rows from the stream.
    with zipfile.ZipFile(tmp_path / "all.npz") as archive, archive.open("arr_0.npy") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        assert (shape, fortran, dtype) == (expected.shape, False, np.uint8)
        rows = np.frombuffer(stream.read(2 * expected[0].size), dtype).reshape(2, *shape[1:])
        assert np.array_equal(rows, expected[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_a_failed_evaluation_leaves_no_npz(tmp_path):
    def fail():
        with saving(tmp_path / "all.npz", PartialState(cpu=True)) as each:
            each([0], PICTURES[:1])
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_folder_has_a_png_per_image(tmp_path):
    prepare_folder(tmp_path / "new" / "all", replace=False, resuming=False)
    save(tmp_path / "new" / "all")
    names = ["00000000.png", "00000001.png", "00000002.png", "00000004.png", "00000007.png"]
    files = sorted((tmp_path / "new" / "all").iterdir())
    assert [file.name for file in files] == names
    for file, picture in zip(files, PICTURES, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), picture.permute(1, 2, 0))


def test_earlier_pictures_are_replaced_only_if_that_is_asked_for(tmp_path):
    for name in ("00000009.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="is not empty: give a new folder to --save"):
        prepare_folder(tmp_path, replace=False, resuming=False)
    prepare_folder(tmp_path, replace=False, resuming=True)
    assert (tmp_path / "00000009.png").exists()
    prepare_folder(tmp_path, replace=True, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"notes\.txt: cannot be made"):
        prepare_folder(tmp_path / "notes.txt", replace=True, resuming=False)


def test_values_of_a_range_are_saved_as_they_are(tmp_path):
    images = PixelFormat(1, (-5, 1000))
    levels = torch.rand(3, 1, 6, 4, generator=torch.Generator().manual_seed(0)) * 255
    expected = np.interp(levels.double().permute(0, 2, 3, 1), (0, 255), (-5, 1000))
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", tmp_path / "all.npz"):
        with saving(target, PartialState(cpu=True), images) as each:
            each([0, 1, 4], levels)
    found = [np.load(tmp_path / "folder" / f"{number:08d}.npy") for number in (0, 1, 4)]
    for values in (np.stack(found), np.load(tmp_path / "all.npz")["arr_0"]):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=2**-23, atol=1005 * 2**-23)
    with pytest.raises(UserError, match="is not empty"):
        prepare_folder(tmp_path / "folder", replace=False, resuming=False)
    prepare_folder(tmp_path / "folder", replace=True, resuming=False)
    assert not list((tmp_path / "folder").iterdir())


def test_grey_pictures_are_saved_as_grey(tmp_path):
    with saving(tmp_path, PartialState(cpu=True), PixelFormat(1)) as each:
        each([0], PICTURES[:1, :1])
    picture = Image.open(tmp_path / "00000000.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(picture, PICTURES[0, 0])
