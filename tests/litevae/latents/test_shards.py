import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import LatentDataset, Settings, encode_images, sample_latents, verify
from litevae.latents.index import marker_path, read_marker
from litevae.latents.shards import (
    MOMENTS,
    Unfinished,
    find_damage,
    read_unfinished,
    unfinished_path,
    write_shard,
    write_unfinished,
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, model_folder, photographs):
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    model, settings = LiteVAE.from_pretrained(model_folder), Settings(32, mirror=True, shard_size=4)
    encode_images(model, open_images(str(photographs)), folder, settings, workers=0, max_bad_fraction=0.1)
    return folder


@pytest.fixture
def folder(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "latents")


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_images_and_then_their_mirrored_copies(folder, workers):
    dataset = LatentDataset(folder)
    assert (len(dataset), dataset.count) == (20, 10)
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    expected = torch.cat([shard[name] for name in ("moments", "moments_mirrored") for shard in shards])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(DataLoader(dataset, 3, sampler=order, num_workers=workers))
    moments = torch.cat([batch.moments for batch in batches])
    assert moments.dtype == torch.float32
    assert torch.equal(moments, expected[order].float())
    labels = [0] * 4 + [1] * 3 + [2] * 3
    assert torch.cat([batch.label for batch in batches]).tolist() == [labels[i % 10] for i in order]
    assert dataset.name(13) == dataset.name(3) == "a/03.png"
    plain = LatentDataset(folder, mirrored=False)
    assert len(plain) == 10
    with pytest.raises(IndexError, match="item 10 of 10"):
        plain[10]


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(-3, None),
        slice(None, None, -7),
        slice(5, 5),
        [3, -1],
        [],
        torch.tensor([19, 0, 0]),
        torch.arange(20) % 2 == 0,
        np.array([12, 4]),
    ],
    ids=str,
)
def test_several_items_are_those_of_a_tensor(folder, index):
    dataset = LatentDataset(folder, check=False)
    items = [dataset[i] for i in range(20)]
    positions = np.arange(20)[
        index if isinstance(index, slice) else np.asarray(index, dtype=None if len(index) else int)
    ]
    found = dataset[index]
    assert found.moments.shape == (len(positions), 8, 8, 8)
    assert found.label.dtype == torch.int64
    for row, position in enumerate(positions):
        assert torch.equal(found.moments[row], items[position].moments)
        assert found.label[row] == items[position].label


@pytest.mark.parametrize("index", [-1, -20, np.int64(-1), torch.tensor(-1), torch.tensor(3)])
def test_one_item_counts_from_either_end(folder, index):
    dataset = LatentDataset(folder, check=False)
    item = dataset[index]
    assert isinstance(item.label, int)
    assert torch.equal(item.moments, dataset[int(index) % 20].moments)


EMPTY = np.empty(0)
WITHOUT_ITEM = [20, -21, 2**70, -(10**5000), [20], torch.tensor([-21]), np.array([2**63], np.uint64)]
WRONG_MASK = [[True], torch.ones(19, dtype=torch.bool), np.zeros(21, bool), np.empty(0, bool)]
NO_INDEX = [
    1.0,
    1e400,
    float("nan"),
    1j,
    None,
    ...,
    True,
    False,
    np.True_,
    np.float64(1),
    "1",
    b"1",
    "",
    {},
    {1: 2},
]
NO_INDEX += [{1}, object(), [1.0], [None], ["1"], [1, "1"], [[1]], [[1], [1, 2]], slice(1.0), EMPTY]
NO_INDEX += [np.zeros((2, 2), int), np.array(1.0), np.array(True), np.empty((0, 2), int), [[]]]
NO_INDEX += [
    torch.tensor(1.0),
    torch.tensor(True),
    torch.tensor([1.0]),
    torch.empty(0),
    torch.ones(2, 20) > 0,
]
NO_INDEX += [
    torch.zeros(1, 1, dtype=torch.int64),
    torch.ones(2, requires_grad=True),
    torch.ones(2).bfloat16(),
]
NO_INDEX += [torch.zeros(2, dtype=torch.int64, device="meta"), torch.eye(2).to_sparse()]


@pytest.mark.parametrize(
    ("index", "error"),
    [
        *((index, IndexError) for index in (*WITHOUT_ITEM, *WRONG_MASK)),
        *((index, TypeError) for index in NO_INDEX),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_index_that_selects_no_items_is_refused_in_one_line(folder, index, error):
    dataset = LatentDataset(folder, check=False)
    for use in (dataset.__getitem__, *([dataset.name] * (error is TypeError or isinstance(index, int)))):
        with pytest.raises(error) as caught:
            use(index)
        assert "\n" not in str(caught.value)
        assert 0 < len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int32, np.uint64, torch.int16, torch.uint8, torch.int32]
)
def test_whole_numbers_of_any_type_are_indices(folder, kind):
    dataset = LatentDataset(folder, check=False)
    many = torch.tensor([3, 7], dtype=kind) if isinstance(kind, torch.dtype) else np.array([3, 7], kind)
    assert torch.equal(dataset[many].moments, torch.stack([dataset[3].moments, dataset[7].moments]))
    assert torch.equal(dataset[many[1]].moments, dataset[7].moments)
    assert dataset.name(many[1]) == dataset.name(7) == dataset.name(-13)


def test_a_copy_for_another_process_maps_the_files_itself(folder):
    dataset = LatentDataset(folder, check=False)
    first = dataset[0]
    assert dataset.files
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy.files
    assert torch.equal(copy[0].moments, first.moments)


def test_samples_are_scaled_draws_from_the_posterior(folder):
    dataset = LatentDataset(folder)
    moments = torch.stack([dataset[i].moments for i in range(3)])
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5)).double()
    expected = (mean + (logvar / 2).exp() * noise - 0.25) * 0.5  # the shift and scaling factors of the model
    found = dataset.sample(moments, torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=8 * 2**-24 * expected.abs().max().item()
    )
    plain = sample_latents(moments, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close((plain - 0.25) * 0.5, found, rtol=0, atol=0)


def change(key, value):
    def edit(folder):
        path = folder / "index.json"
        index = json.loads(path.read_text())
        *place, last = key
        entry = index
        for name in place:
            entry = entry[name]
        entry[last] = value
        path.write_text(json.dumps(index))

    return edit


def cut(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def swap(folder):
    """Writes another shard, whose digest is listed but whose tensors do not fit."""
    shard = write_shard(
        folder, 1, 4, [("x", None)] * 3, {"moments": torch.zeros(3, 8, 8, 8).half()}, {"b/05.png": ""}
    )
    change(["shards", 1, "sha256"], shard.sha256)(folder)
    change(["shards", 1, "bytes"], shard.bytes)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "latents: has no index.json: not encoded images"),
        (
            lambda folder: (folder / "index.json").write_text("{"),
            "index.json: not the index of encoded images",
        ),
        (
            lambda folder: (folder / "index.json").write_text("[]"),
            "index.json: not the index of encoded images",
        ),
        (
            change(["format"], "other"),
            "is of format 'other'; this version reads 'litevae latents, version 1'",
        ),
        (change(["complete"], False), "latents: not complete"),
        (change(["shards", 0], {}), "not the index of encoded images"),
        (
            change(["shards", 0, "sha256"], "0" * 64),
            "shard-00000.safetensors: its content is not what was written",
        ),
        (change(["shards", 1, "first"], 5), "shard-00001.safetensors: is listed in index.json with numbers"),
        (change(["shards", 1, "count"], 2), "shard-00001.safetensors: does not hold what index.json says"),
        (
            change(["latents", "shape"], [8, 4, 4]),
            "shard-00000.safetensors: does not hold what index.json says",
        ),
        (change(["images", "count"], 12), "index.json: lists 11 of 12 images"),
        (lambda folder: (folder / "shard-00002.safetensors").unlink(), "shard-00002.safetensors: is missing"),
        (cut, "shard-00001.safetensors: has [0-9]+ bytes, not [0-9]+"),
        (swap, "shard-00001.safetensors: does not hold what index.json says"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        verify(folder)
    with pytest.raises(UserError, match=message):
        LatentDataset(folder)


def test_lengths_are_checked_in_any_case(folder):
    cut(folder)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: has "):
        LatentDataset(folder, check=False)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        LatentDataset(tmp_path / "nowhere")


def test_completion_marker_describes_the_shard(tmp_path):
    tensors = {MOMENTS: torch.zeros(2, 8, 4, 4).half()}
    shard = write_shard(tmp_path, 3, 9, [("a", "x"), ("b", None)], tensors, {"c": "broken"})
    assert (shard.first, shard.images, shard.count, shard.bad) == (9, 3, 2, {"c": "broken"})
    assert read_marker(tmp_path, 3) == shard
    assert find_damage(tmp_path, shard) is None
    assert read_marker(tmp_path, 4) is None
    marker_path(tmp_path, 3).write_text("{")
    assert read_marker(tmp_path, 3) is None


def test_unfinished_shard_is_read_as_it_was_written(tmp_path):
    unfinished = Unfinished(torch.randn(2, 3, 8, 4, 4).half(), ["x", None, "y"], {1: "broken"})
    identity = {"model": "m", "encoding": {"mirror": True}}
    assert read_unfinished(tmp_path, 0, identity) is None
    write_unfinished(tmp_path, 0, identity, unfinished)
    found = read_unfinished(tmp_path, 0, identity)
    assert torch.equal(found.moments, unfinished.moments)
    assert (found.labels, found.bad) == (unfinished.labels, unfinished.bad)
    with pytest.raises(ValueError, match="was left by a run with another --batch-size"):
        read_unfinished(tmp_path, 0, {"model": "other"})
    path = unfinished_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="its content is not what was written"):
        read_unfinished(tmp_path, 0, identity)
