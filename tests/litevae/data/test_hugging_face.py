import pickle
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from litevae.data.pixels import BadImage
from litevae.data.sources import open_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def dataset(png):
    """Makes a dataset of random pictures."""

    def make(numbers, column="image", **columns):
        images = [{"bytes": png(number), "path": None} for number in numbers]
        return datasets.Dataset.from_dict({column: images, **columns}).cast_column(column, datasets.Image())

    return make


def test_saved_dataset(tmp_path, assert_pictures, dataset):
    dataset(range(5), label=list(range(5))).with_format("numpy").save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    assert_pictures(source, range(5))
    assert_pictures(pickle.loads(pickle.dumps(source)), range(5))
    assert source.name(3) == f"{tmp_path / 'data'}, row 3"


def test_splits_of_a_dataset_are_chosen_by_folder(tmp_path, assert_pictures, refusal, dataset):
    splits = {"train": dataset([1, 2]), "test": dataset([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    message = refusal(tmp_path / "data")
    assert "train, test" in message
    assert str(tmp_path / "data" / "train") in message
    assert_pictures(open_images(str(tmp_path / "data" / "test")), [3])
    datasets.DatasetDict({"train": dataset([4])}).save_to_disk(tmp_path / "one")
    assert_pictures(open_images(str(tmp_path / "one")), [4])


def test_rows_without_bytes_are_files_and_empty_rows_bad(tmp_path, picture, png, write):
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


def test_column_of_images_is_found(tmp_path, assert_pictures, refusal, dataset):
    dataset([1], "photo", caption=["x"]).save_to_disk(tmp_path / "other")
    assert_pictures(open_images(str(tmp_path / "other")), [1])
    two = datasets.concatenate_datasets([dataset([1]), dataset([2], "mask")], axis=1)
    two.save_to_disk(tmp_path / "two")
    assert_pictures(open_images(str(tmp_path / "two")), [1])
    two.rename_column("image", "photo").save_to_disk(tmp_path / "unclear")
    assert "images are in photo, mask: rename" in refusal(tmp_path / "unclear")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "none")
    assert "no column of images, only text" in refusal(tmp_path / "none")


@pytest.mark.parametrize("with_metadata", [True, False])
def test_parquet(tmp_path, with_metadata, assert_pictures, refusal, dataset):
    for number in range(2):
        rows = dataset([2 * number, 2 * number + 1])
        if not with_metadata:  # other programs write files without those of `datasets`
            rows = datasets.Dataset(rows.data.table.replace_schema_metadata(None))
        rows.to_parquet(tmp_path / f"train-{number}.parquet")
    assert_pictures(open_images(f"{tmp_path}/train-*.parquet"), range(4))
    assert_pictures(open_images(f"{tmp_path}/train-1.parquet"), [2, 3])
    assert "name those of one split" in refusal(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert f"{tmp_path}/broken.parquet: cannot be read" in refusal(tmp_path / "broken.parquet")


def test_broken_saved_dataset(tmp_path, refusal, dataset):
    dataset(range(2)).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    assert f"{tmp_path}: cannot be read" in refusal(tmp_path)


def test_missing_package_is_named(tmp_path, monkeypatch, refusal, dataset):
    dataset([0]).save_to_disk(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets: pip install 'litevae[datasets]'" in refusal(tmp_path)


def test_labels_of_a_dataset_are_its_column_of_that_name(tmp_path, picture, assert_pictures):
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


def test_columns_that_seem_to_hold_classes_are_named(tmp_path, dataset):
    columns = {"fine_label": [1], "caption": ["x"], "Category": ["a"], "cls": [2]}
    rows = dataset([1], **columns, kind=[0]).cast_column("kind", datasets.ClassLabel(names=["cat"]))
    rows.save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    assert source.unused_labels == ["fine_label", "Category", "cls", "kind"]
    assert source.label(0) is None
    rows.add_column("label", [3]).save_to_disk(tmp_path / "labelled")
    assert open_images(str(tmp_path / "labelled")).unused_labels == []


def test_a_label_of_a_thousand_characters_is_the_longest(tmp_path, dataset):
    dataset(range(2), label=["x" * 1000, "x" * 1001]).save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    assert source.label(0) == "x" * 1000
    with pytest.raises(BadImage, match="its label must have at most 1,000 characters, got 1,001"):
        source.label(1)


@pytest.mark.parametrize("label", [3, 2**40, -2])
def test_label_out_of_range_makes_a_bad_image(tmp_path, dataset, label):
    data = dataset(range(2), label=[1, 0]).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    table = data.data.table.set_column(data.column_names.index("label"), "label", [[label, 0]])
    data = datasets.Dataset(datasets.table.InMemoryTable(table), data.info)
    data.save_to_disk(tmp_path / "data")
    source = open_images(str(tmp_path / "data"))
    assert source.label(1) == "a"
    with pytest.raises(BadImage, match=f"its label must be from 0 to 2, or -1 for none, got {label}"):
        source.label(0)
