import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from skimage import data

from litevae.data.pixels import BadImage, PixelFormat
from litevae.data.sources import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, load_photograph, open_images
from litevae.errors import UserError


def test_photographs_are_colour_and_chelsea_is_held_out(names):
    chelsea = load_photograph(HELD_OUT_PHOTOGRAPH)
    np.testing.assert_array_equal(chelsea, data.chelsea())
    source = open_images("demo")
    assert names(source) == list(TRAINING_PHOTOGRAPHS)
    for photograph in (source.load(i) for i in range(len(source))):
        assert photograph.dtype == np.uint8
        assert photograph.shape[2] == 3
        assert photograph.shape != chelsea.shape
        assert not np.array_equal(photograph[..., 0], photograph[..., 1])


def test_photographs_need_no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr("socket.socket.connect", refuse)
    open_images("demo")
    load_photograph(HELD_OUT_PHOTOGRAPH)


def test_folder_is_searched_in_sorted_order_without_hidden_and_other_files(
    tmp_path, png, write, names, assert_pictures
):
    for number, name in enumerate(["a/2.png", "a/10.JPEG", "b/c/d/x.webp", "b/é\udcff.png", "z.png"]):
        write(tmp_path / name, png(number))
    for name in ["a/labels.txt", ".hidden.png", ".git/x.png", "b/._x.png", "b/archive.zip", "a/png"]:
        write(tmp_path / name, b"x")
    source = open_images(str(tmp_path))
    expected = ["z.png", "a/10.JPEG", "a/2.png", "b/é\udcff.png", "b/c/d/x.webp"]
    assert names(source) == [str(tmp_path / name) for name in expected]
    assert_pictures(source, [4, 1, 0, 3, 2])
    assert_pictures(pickle.loads(pickle.dumps(source)), [4, 1, 0, 3, 2])


def test_file_that_is_gone_is_a_bad_image(tmp_path, png, write):
    write(tmp_path / "x.png", png(0))
    source = open_images(str(tmp_path))
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadImage, match="no such file"):
        source.load(0)


def test_home_is_expanded(tmp_path, monkeypatch, png, write, assert_pictures):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "images/x.png", png(7))
    assert_pictures(open_images("~/images"), [7])


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("", range(12)),
        ("/train-001.tar", range(4, 8)),
        ("/train-*.tar", range(12)),
        ("/train-00[02].tar", [0, 1, 2, 3, 8, 9, 10, 11]),
        ("/train-{002,000}.tar", [8, 9, 10, 11, 0, 1, 2, 3]),
        ("/train-002.tar::{folder}/train-000.tar", [8, 9, 10, 11, 0, 1, 2, 3]),
    ],
)
def test_shards_by_folder_file_and_pattern(tmp_path, path, numbers, write_shards, assert_pictures):
    write_shards(tmp_path)
    source = open_images(f"{tmp_path}{path.replace('{folder}', str(tmp_path))}")
    assert_pictures(source, list(numbers))
    assert_pictures(pickle.loads(pickle.dumps(source)), list(numbers))


def test_paths_without_images_are_refused(tmp_path, png, write, write_tar, refusal):
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "no file matches it as a pattern" in refusal(
        tmp_path / "x-{000..003}.tar".replace("{000..003}", "*")
    )
    assert "no images in this folder" in refusal(tmp_path)
    write(tmp_path / "deep/text.txt", b"x")
    assert "no images in this folder" in refusal(tmp_path)
    assert "must be a folder, or name only .tar" in refusal(tmp_path / "deep/text.txt")
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    assert "contains no images" in refusal(tmp_path)
    assert f"{tmp_path}/x-001.tar: no such file" in refusal(f"{tmp_path}/x-{{001..003}}.tar")
    assert "nbalanced" in refusal(f"{tmp_path}/x-{{001")
    write(tmp_path / "x.png", png(0))
    assert "both images and .tar shards" in refusal(tmp_path)
    for name in ("x.tar.gz", "x.zip"):
        write(tmp_path / name, b"")
        assert "unpack them" in refusal(tmp_path / name)
    write(tmp_path / "text.tar", b"text" * 1000)
    assert "not a whole .tar file" in refusal(tmp_path / "text.tar")
    write(tmp_path / "nothing.tar", b"")
    assert "not a whole .tar file" in refusal(tmp_path / "nothing.tar")
    assert "no images given" in refusal("")


def test_keys_do_not_depend_on_where_the_images_lie(tmp_path, monkeypatch, png, write, write_tar):
    for place in ("one", "two/deeper"):
        for name in ("b/x/2.png", "a.png", "b/1.png"):
            write(tmp_path / place / "images" / name, png(1))
        write_tar(tmp_path / place / "shards" / "0" / "s.tar", [("1.png", png(1))])
        write_tar(tmp_path / place / "shards" / "1" / "s.tar", [("1.png", png(1))])
        folder = open_images(str(tmp_path / place / "images"))
        assert [folder.key(i) for i in range(3)] == ["a.png", "b/1.png", "b/x/2.png"]
        assert [folder.label(i) for i in range(3)] == [None, "b", "b/x"]
        shards = open_images(str(tmp_path / place / "shards" / "{0..1}" / "s.tar"))
        assert [shards.key(i) for i in range(2)] == ["0/s.tar:1.png", "1/s.tar:1.png"]
    monkeypatch.chdir(tmp_path / "one")
    assert open_images("images").key(1) == "b/1.png"
    demo = open_images("demo")
    assert (demo.key(0), demo.label(0)) == ("astronaut", None)


def test_hidden_shards_are_left_out(tmp_path, png, write, write_tar, assert_pictures):
    write_tar(tmp_path / "x.tar", [("0.png", png(0))])
    write(tmp_path / "._x.tar", b"a resource fork, as macOS writes it")
    assert_pictures(open_images(str(tmp_path)), [0])


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "in_a_folder/x.tar"])
def test_only_regular_files_are_opened(tmp_path, refusal, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    assert "not a regular file" in refusal(path if path.parent == tmp_path else path.parent)


def test_an_image_must_be_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").symlink_to("/dev/zero")
    images = open_images(str(tmp_path))
    for i in range(2):
        with pytest.raises(BadImage, match="not a regular file"):
            images.load(i)


@pytest.mark.parametrize("channels", [1, 4])
def test_photographs_of_the_demo_in_other_channels(channels):
    source = open_images("demo", PixelFormat(channels))
    photograph = Image.fromarray(load_photograph(TRAINING_PHOTOGRAPHS[0]))
    expected = np.asarray(photograph.convert({1: "L", 4: "RGBA"}[channels]))
    np.testing.assert_array_equal(source.load(0), expected.reshape(*expected.shape[:2], channels))


def test_the_demo_has_no_range_of_values():
    with pytest.raises(UserError, match="demo: its photographs have 8 bits"):
        open_images("demo", PixelFormat(3, (0, 255)))


@pytest.fixture
def arrays(tmp_path):
    """Writes x.npy, y.jpg, and a .tar file of both in a folder of its own; returns the array."""
    array = np.random.default_rng(0).integers(0, 4096, (9, 7), dtype=np.uint16)
    (tmp_path / "files").mkdir()
    (tmp_path / "tars").mkdir()
    np.save(tmp_path / "files" / "x.npy", array)
    Image.fromarray(load_photograph("astronaut")[:9, :7]).save(tmp_path / "files" / "y.jpg")
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for name in ("x.npy", "y.jpg"):
            tar.add(tmp_path / "files" / name, arcname=name)
    return array


@pytest.mark.parametrize("folder", ["files", "tars"])
def test_only_with_a_range_arrays_are_images(arrays, tmp_path, folder, capsys):
    plain = open_images(str(tmp_path / folder))
    assert (len(plain), plain.key(0)[-5:]) == (1, "y.jpg")
    source = open_images(str(tmp_path / folder), PixelFormat(1, (0, 4095)))
    assert (len(source), source.key(0)[-5:]) == (1, "x.npy")
    expected = arrays[..., None].astype(np.float64) * (255 / 4095)
    np.testing.assert_allclose(source.load(0), expected, rtol=2**-23)


def test_a_folder_without_arrays_says_which_files_count(arrays, tmp_path):
    (tmp_path / "files" / "x.npy").unlink()
    with pytest.raises(UserError, match=r"no images \(\.npy, \.png, \.tif, \.tiff\) in this folder"):
        open_images(str(tmp_path / "files"), PixelFormat(1, (0, 4095)))


def test_arrays_in_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    array, file = np.random.default_rng(0).uniform(-1, 1, (6, 5, 4)), io.BytesIO()
    np.save(file, array)
    column = datasets.Features({"image": datasets.Image(decode=False)})
    rows = {"image": [{"bytes": file.getvalue(), "path": None}]}
    datasets.Dataset.from_dict(rows, column).save_to_disk(tmp_path / "rows")
    source = open_images(str(tmp_path / "rows"), PixelFormat(4, (-1, 1)))
    np.testing.assert_allclose(source.load(0), (array + 1) * 127.5, rtol=2**-23)
