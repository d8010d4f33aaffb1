import io
import os
import pickle
import sys
import tarfile

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image
from skimage import data

from litevae.data.images import BadImage
from litevae.data.sources import (
    HELD_OUT_PHOTOGRAPH,
    TRAINING_PHOTOGRAPHS,
    PackedStrings,
    load_photograph,
    open_images,
)
from litevae.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number, size=(12, 10)):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def names(source):
    return [source.name(i) for i in range(len(source))]


def assert_pictures(source, numbers):
    assert len(source) == len(numbers)
    for i, number in enumerate(numbers):
        np.testing.assert_array_equal(source.load(i), picture(number))


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_images(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_photographs_are_colour_and_chelsea_is_held_out():
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


def test_folder_is_searched_in_sorted_order_without_hidden_and_other_files(tmp_path):
    for number, name in enumerate(["a/2.png", "a/10.JPEG", "b/c/d/x.webp", "b/é\udcff.png", "z.png"]):
        write(tmp_path / name, png(number))
    for name in ["a/labels.txt", ".hidden.png", ".git/x.png", "b/._x.png", "b/archive.zip", "a/png"]:
        write(tmp_path / name, b"x")
    source = open_images(str(tmp_path))
    expected = ["z.png", "a/10.JPEG", "a/2.png", "b/é\udcff.png", "b/c/d/x.webp"]
    assert names(source) == [str(tmp_path / name) for name in expected]
    assert_pictures(source, [4, 1, 0, 3, 2])
    assert_pictures(pickle.loads(pickle.dumps(source)), [4, 1, 0, 3, 2])


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere/x.png", png(0))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/here").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    assert names(open_images(str(tmp_path / "images"))) == [str(tmp_path / "images/here/x.png")]


def test_file_that_is_gone_is_a_bad_image(tmp_path):
    write(tmp_path / "x.png", png(0))
    source = open_images(str(tmp_path))
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadImage, match="no such file"):
        source.load(0)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "images/x.png", png(7))
    assert_pictures(open_images("~/images"), [7])


def write_shards(folder):
    for shard in range(3):
        writer = webdataset.TarWriter(str(folder / f"train-{shard:03}.tar"))
        for number in range(shard * 4, shard * 4 + 4):
            writer.write({"__key__": f"sample{number:05}", "png": png(number), "cls": b"3", "json": b"{}"})
        writer.close()


def test_shards_hold_what_webdataset_reads(tmp_path):
    write_shards(tmp_path)
    pattern = str(tmp_path / "train-{000..002}.tar")
    reader = webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png")
    source = open_images(pattern)
    for i, (key, pixels) in enumerate(reader):
        assert source.name(i) == f"{tmp_path}/train-{i // 4:03}.tar:{key}.png"
        np.testing.assert_array_equal(source.load(i), pixels)
    assert len(source) == i + 1 == 12


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
def test_shards_by_folder_file_and_pattern(tmp_path, path, numbers):
    write_shards(tmp_path)
    source = open_images(f"{tmp_path}{path.replace('{folder}', str(tmp_path))}")
    assert_pictures(source, list(numbers))
    assert_pictures(pickle.loads(pickle.dumps(source)), list(numbers))


def test_image_of_a_sample_is_its_plain_one(tmp_path):
    members = [
        ("./a/1.mask.png", b""),
        ("./a/1.png", png(1)),
        ("./a/1.txt", b""),
        ("./a/2.txt", b""),
        ("._3.png", b""),
        ("b.c/4.left.JPG", png(4)),
        ("b.c/4.right.JPG", png(5)),
        ("readme", b""),
    ]
    write_tar(tmp_path / "x.tar", members)
    source = open_images(str(tmp_path))
    assert_pictures(source, [1, 4])
    assert names(source) == [f"{tmp_path}/x.tar:./a/1.png", f"{tmp_path}/x.tar:b.c/4.left.JPG"]


def test_long_names_in_a_shard(tmp_path):
    name = "é" * 300 + "/x.png"
    write_tar(tmp_path / "x.tar", [(name, png(0))])
    assert names(open_images(str(tmp_path))) == [f"{tmp_path}/x.tar:{name}"]


def test_shard_cut_off_is_refused(tmp_path):
    write_tar(tmp_path / "whole.tar", [(f"{number}.png", png(number)) for number in range(5)])
    content = (tmp_path / "whole.tar").read_bytes()
    last = open_images(str(tmp_path / "whole.tar")).places[-1]
    used = -(-int(last[1] + last[2]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path = tmp_path / "cut.tar"
    for cut in np.random.default_rng(0).integers(0, used, 40):
        if cut % tarfile.BLOCKSIZE:  # tar knows no number of members: after any of them may be the end
            path.write_bytes(content[:cut])
            assert str(path) in refusal(path)
    path.write_bytes(content[:used])  # without the blocks at the end, as a writer that was killed leaves it
    assert len(open_images(str(path))) == 5


def test_shard_with_a_broken_header_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{number}.png", png(number)) for number in range(5)])
    content = bytearray(path.read_bytes())
    offset = content.index(b"3.png")
    content[offset + 150] ^= 0xFF
    path.write_bytes(content)
    assert "not a whole .tar file: broken header" in refusal(path)


def test_shard_that_is_gone_or_shorter_gives_bad_images(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.png", png(0))])
    source = open_images(str(tmp_path))
    os.truncate(tmp_path / "x.tar", 600)
    with pytest.raises(BadImage, match="cannot be read"):
        source.load(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.load(0)


def dataset(numbers, column="image", **columns):
    images = [{"bytes": png(number), "path": None} for number in numbers]
    return datasets.Dataset.from_dict({column: images, **columns}).cast_column(column, datasets.Image())


def test_saved_dataset(tmp_path):
    dataset(range(5), label=list(range(5))).with_format("numpy").save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    assert_pictures(source, range(5))
    assert_pictures(pickle.loads(pickle.dumps(source)), range(5))
    assert source.name(3) == f"{tmp_path / 'data'}, row 3"


def test_splits_of_a_dataset_are_chosen_by_folder(tmp_path):
    splits = {"train": dataset([1, 2]), "test": dataset([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    message = refusal(tmp_path / "data")
    assert "train, test" in message
    assert str(tmp_path / "data" / "train") in message
    assert_pictures(open_images(str(tmp_path / "data" / "test")), [3])
    datasets.DatasetDict({"train": dataset([4])}).save_to_disk(tmp_path / "one")
    assert_pictures(open_images(str(tmp_path / "one")), [4])


def test_rows_without_bytes_are_files_and_empty_rows_bad(tmp_path):
    write(tmp_path / "x.png", png(0))
    images = [{"bytes": None, "path": str(tmp_path / "x.png")}, None, {"bytes": b"", "path": None}]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    rows.save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    np.testing.assert_array_equal(source.load(0), picture(0))
    with pytest.raises(BadImage, match="the row is empty"):
        source.load(1)
    with pytest.raises(BadImage, match="not an image"):
        source.load(2)


def test_column_of_images_is_found(tmp_path):
    dataset([1], "photo", caption=["x"]).save_to_disk(tmp_path / "other")
    assert_pictures(open_images(str(tmp_path / "other")), [1])
    two = datasets.concatenate_datasets([dataset([1]), dataset([2], "mask")], axis=1)
    two.save_to_disk(tmp_path / "two")
    assert_pictures(open_images(str(tmp_path / "two")), [1])
    two.rename_column("image", "photo").save_to_disk(tmp_path / "unclear")
    assert "images are in photo, mask: rename" in refusal(tmp_path / "unclear")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "none")
    assert "no column of images, only text" in refusal(tmp_path / "none")


@pytest.mark.parametrize("noted", [True, False])
def test_parquet(tmp_path, noted):
    for number in range(2):
        rows = dataset([2 * number, 2 * number + 1])
        if not noted:  # as other programs write it
            rows = datasets.Dataset(rows.data.table.replace_schema_metadata(None))
        rows.to_parquet(tmp_path / f"train-{number}.parquet")
    assert_pictures(open_images(f"{tmp_path}/train-*.parquet"), range(4))
    assert_pictures(open_images(f"{tmp_path}/train-1.parquet"), [2, 3])
    assert "name those of one split" in refusal(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert f"{tmp_path}/broken.parquet: cannot be read" in refusal(tmp_path / "broken.parquet")


def test_broken_saved_dataset(tmp_path):
    dataset(range(2)).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    assert f"{tmp_path}: cannot be read" in refusal(tmp_path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    dataset([0]).save_to_disk(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets: pip install 'litevae[datasets]'" in refusal(tmp_path)


def test_paths_without_images_are_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "no pattern that matches" in refusal(tmp_path / "x-{000..003}.tar".replace("{000..003}", "*"))
    assert "no images in this folder" in refusal(tmp_path)
    write(tmp_path / "deep/text.txt", b"x")
    assert "no images in this folder" in refusal(tmp_path)
    assert "must be a folder, or name only .tar" in refusal(tmp_path / "deep/text.txt")
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    assert "no images in there" in refusal(tmp_path)
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
    assert "local disks only" in refusal("https://example.org/x.tar")
    assert "no images given" in refusal("")


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "inside/x.png", png(0))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inside"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'inside'}: cannot be read: Permission denied" in refusal(tmp_path)


def test_packed_strings_are_the_strings():
    strings = ["", "a/b.png", "ü\udcfe", ""]
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(len(packed))] == strings


def test_keys_do_not_depend_on_where_the_images_lie(tmp_path, monkeypatch):
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


def test_labels_of_shards_are_their_cls_members(tmp_path):
    members = [("1.cls", b"7\n"), ("1.png", png(1)), ("2.png", png(2)), ("3.png", png(3)), ("3.CLS", b"cat")]
    write_tar(tmp_path / "s.tar", members)
    source = open_images(str(tmp_path / "s.tar"))
    assert_pictures(source, [1, 2, 3])
    assert [source.label(i) for i in range(3)] == ["7", None, "cat"]


def test_labels_of_a_dataset_are_its_column_of_that_name(tmp_path):
    images = [Image.fromarray(picture(i)) for i in range(3)]
    kinds = {
        "classes": (datasets.ClassLabel(names=["cat", "dog"]), [1, 0, -1], ["dog", "cat", None]),
        "numbers": (datasets.Value("int64"), [4, None, 2], ["4", None, "2"]),
        "text": (datasets.Value("string"), ["x", "y", None], ["x", "y", None]),
    }
    for name, (feature, values, expected) in kinds.items():
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({"image": images, "label": values}, features).save_to_disk(tmp_path / name)
        source = open_images(str(tmp_path / name))
        assert [source.label(i) for i in range(3)] == expected
        assert_pictures(source, [0, 1, 2])
        assert source.key(2) == "row 2"
