import numpy as np
import pytest
import torch
from skimage import data

from litevae.errors import UserError
from litevae.training.data import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, RandomCrops, load_photograph


@pytest.fixture(scope="module")
def photographs():
    return [load_photograph(name) for name in TRAINING_PHOTOGRAPHS]


def test_photographs_are_colour_and_chelsea_is_held_out(photographs):
    chelsea = load_photograph(HELD_OUT_PHOTOGRAPH)
    np.testing.assert_array_equal(chelsea, data.chelsea())
    for photograph in photographs:
        assert photograph.dtype == np.uint8
        assert photograph.shape[2] == 3
        assert photograph.shape != chelsea.shape
        assert not np.array_equal(photograph[..., 0], photograph[..., 1])


def test_photographs_need_no_download(photographs, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in (*TRAINING_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPH):
        load_photograph(name)


def test_item_depends_on_seed_and_index_alone(photographs):
    first, second = (RandomCrops(photographs, 32, length, seed=3) for length in (50, 99))
    order = torch.randperm(50).tolist()
    again = {i: second[i] for i in order}
    assert all(torch.equal(first[i], again[i]) for i in range(50))
    assert not all(torch.equal(first[i], RandomCrops(photographs, 32, 50, seed=4)[i]) for i in range(5))
    assert len({first[i].numpy().tobytes() for i in range(50)}) == 50


def test_crops_are_windows_of_the_photographs_half_of_them_mirrored():
    # a pixel that says where it is
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    crops = RandomCrops([np.stack([rows, columns, rows], axis=2)], 8, 200, seed=0)
    steps, corners = [], set()
    for crop in (crops[i].int() for i in range(200)):
        assert crop.shape == (3, 8, 8)
        assert (crop[0].diff(dim=0) == 1).all()
        steps += crop[1].diff(dim=1).unique().tolist()
        corners.add((crop[0].min().item(), crop[1].min().item()))
    assert 60 < steps.count(-1) < 140
    assert steps.count(1) == 200 - steps.count(-1)
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 12, 0, 22)


def test_crop_larger_than_a_photograph_is_refused(photographs):
    with pytest.raises(UserError, match="crops of 600 pixels do not fit photographs of 400 pixels"):
        RandomCrops(photographs, 600, 1, seed=0)
