import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader

from litevae.data.crops import CropSettings, Order, TrainingCrops, collate
from litevae.data.pixels import BadImage
from litevae.data.remote_parquet import GROUPS_TOGETHER
from litevae.data.sources import open_images


@pytest.fixture
def files(server, png):
    """Writes 24 pictures to two files in groups of two rows, as `datasets` does."""
    for file in range(2):
        numbers = range(file * 12, file * 12 + 12)
        columns = {
            "image": [{"bytes": png(number), "path": None} for number in numbers],
            "label": [number % 3 - 1 for number in numbers],
            "text": ["x" * 1000] * 12,
        }
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]), text=datasets.Value("string")
        )
        dataset = datasets.Dataset.from_dict(columns, features=features)
        dataset.to_parquet(str(server.folder / f"train-{file}.parquet"), batch_size=2)
    return f"{server.url}/train-{{0..1}}.parquet"


def test_rows_are_those_of_the_local_files(server, files, assert_pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    source, local = open_images(files), open_images(f"{server.folder}/train-{{0..1}}.parquet")
    assert_pictures(source, range(24))
    assert_pictures(pickle.loads(pickle.dumps(source)), range(24))
    for i in range(24):
        assert (source.key(i), source.label(i)) == (local.key(i), local.label(i))
    assert source.name(3) == f"{server.url}/train-0.parquet and 1 more, row 3"


def test_only_the_row_groups_that_are_needed_are_fetched(server, files):
    server.failures.extend([503, 503])
    source = open_images(files)
    before = len(server.requests)
    for failures in ([503, 503], ["cut"], []):
        server.failures.extend(failures)
        source.load(5 + 2 * len(failures))
        source.label(4 + 2 * len(failures))
    fetched = server.requests[before:]
    size = (server.folder / "train-0.parquet").stat().st_size
    ends = [header.removeprefix("bytes=").split("-") for _, header in fetched]
    assert sum(int(end) - int(begin) for begin, end in ends) < size
    assert all(path == "/train-0.parquet" for path, _ in fetched)


def test_an_epoch_reads_each_row_group_once(server, files):
    source = open_images(files)
    crops = TrainingCrops(source, CropSettings(8, "random", True, 0.0), seed=0, length=48)
    before = len(server.requests)
    order = [crops.ordered(i) for i in range(48)]
    for i in range(24):
        assert not crops[i].bad
    assert len(server.requests) - before == 12
    for epoch in (order[:24], order[24:]):
        assert sorted(epoch) == list(range(24))
    assert order[:24] != order[24:]


def test_groups_are_shuffled_together():
    starts = np.arange(0, 300, 10)
    order = Order(300, 5, starts)
    epoch = np.array([order(i) for i in range(300)])
    assert sorted(epoch.tolist()) == list(range(300))
    for start in range(0, 300, 10 * GROUPS_TOGETHER):
        part = epoch[start : start + 10 * GROUPS_TOGETHER]
        assert len(set(part // 10)) == -(-len(part) // 10)
    assert np.corrcoef(epoch, np.arange(300))[0, 1] < 0.5
    assert [Order(300, 5, starts)(i) for i in range(290, 310)] == [order(i) for i in range(290, 310)]


def test_crops_do_not_depend_on_the_processes(files):
    crops = TrainingCrops(open_images(files), CropSettings(8, "random", True, 0.0), seed=3, length=30)
    loader = DataLoader(crops, 5, collate_fn=collate, num_workers=2)
    found = torch.cat([batch.images for batch in loader])
    assert torch.equal(found, collate([crops[i] for i in range(30)]).images)


def test_a_file_that_fails_is_listed(server, files, refusal):
    source = open_images(files)
    server.broken = {"train-1.parquet": 503}
    with pytest.raises(
        BadImage, match=r"row group 2 of http.*/train-1.parquet cannot be read: the server answers 503"
    ):
        source.load(17)
    message = refusal(files)
    assert (
        f"{server.url}/train-1.parquet: the server answers 503 (Service Unavailable), in 4 attempts"
        in message
    )
    server.broken["train-0.parquet"] = 404
    assert "2 of 2 files cannot be read" in refusal(files)


def test_unusable_files_are_refused(server, refusal, png):
    def write(name, **columns):
        parquet.write_table(pa.table(columns), server.folder / name)
        return f"{server.url}/{name}"

    image = {"bytes": png(0), "path": "x.png"}
    assert "has no column of images, only text" in refusal(write("a.parquet", text=["x"]))
    assert "has no rows" in refusal(
        write("b.parquet", image=pa.array([], pa.struct({"bytes": "binary", "path": "str"})))
    )
    first, second = write("c.parquet", image=[image]), write("d.parquet", image=[image], label=[1])
    assert f"{second}: has other columns than {first}" in refusal(f"{first}::{second}")
    (server.folder / "e.parquet").write_bytes(b"x" * 100)
    assert f"{server.url}/e.parquet: cannot be read" in refusal(f"{server.url}/e.parquet")
    rows = [{"bytes": None, "path": "/etc/hostname"}, None, image]
    source = open_images(write("f.parquet", image=rows))
    for number, reason in enumerate(("only a path", "empty")):
        with pytest.raises(BadImage, match=reason):
            source.load(number)
    assert source.load(2).shape == (12, 10, 3)
    assert source.label(2) is None
