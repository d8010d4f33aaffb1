import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from litevae.data.images import BadImage
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import LatentDataset, verify
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
    moments = [torch.randn(2, 3, 8, 4, 4).half(), torch.randn(2, 1, 8, 2, 6).half()]
    labels = {0: "x", 1: None, 3: "y", 4: None}
    unfinished = Unfinished(moments, [[0, 1, 4], [3]], labels, {1: "broken", 2: "too long"})
    assert unfinished.done == {0, 1, 2, 3, 4}
    identity = {"model": "m", "encoding": {"mirror": True}}
    assert read_unfinished(tmp_path, 0, identity) is None
    write_unfinished(tmp_path, 0, identity, unfinished)
    found = read_unfinished(tmp_path, 0, identity)
    assert all(map(torch.equal, found.moments, unfinished.moments))
    assert (found.numbers, found.labels, found.bad) == (unfinished.numbers, unfinished.labels, unfinished.bad)
    with pytest.raises(ValueError, match="was left by a run with another --batch-size"):
        read_unfinished(tmp_path, 0, {"model": "other"})
    path = unfinished_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="its content is not what was written"):
        read_unfinished(tmp_path, 0, identity)


class TestShapes:
    """The files of a folder of whole images."""

    @pytest.fixture
    def folder(self, bucketed, tmp_path):
        return shutil.copytree(bucketed, tmp_path / "latents")

    def test_are_intact(self, folder, shaped):
        index = verify(folder)
        assert index["latents"]["shape"] == [8, None, None]
        assert [shard.count + len(shard.bad) for shard in index["shards"]] == [7, 7, 4]
        bad = {name: reason for shard in index["shards"] for name, reason in shard.bad.items()}
        assert list(bad) == ["04-long.png", "08-broken.png"]
        assert bad["04-long.png"] == "81x20 pixels, longer than 4:1"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda images, tensors: images[0].__setitem__(2, images[0][2] + 1),
            lambda images, tensors: images.pop(),
            lambda images, tensors: tensors.pop(next(name for name in tensors if "mirrored" in name)),
            lambda images, tensors: tensors.update(moments=torch.zeros(1, 8, 4, 4).half()),
            lambda images, tensors: images.__setitem__(0, [*images[0][:2], 0, 8]),
            lambda images, tensors: images.__setitem__(0, images[0][:2]),
        ],
    )
    def test_damage_is_named(self, folder, damage):
        path = folder / "shard-00001.safetensors"
        with safe_open(path, framework="pt") as file:
            images = json.loads(file.metadata()["images"])
        tensors = load_file(path)
        damage(images, tensors)
        content = save(tensors, {"images": json.dumps(images)})
        path.write_bytes(content)
        change(["shards", 1, "sha256"], hashlib.sha256(content).hexdigest())(folder)
        change(["shards", 1, "bytes"], len(content))(folder)
        with pytest.raises(
            UserError, match=r"shard-00001\.safetensors: (does not hold what|cannot be read: each of)"
        ):
            verify(folder)

    def test_a_shard_of_bad_images_is_empty(self, encode, shaped, tmp_path):
        class Images:
            def __init__(self):
                self.images = open_images(str(shaped))

            def __len__(self):
                return len(self.images)

            def __getattr__(self, name):
                return getattr(self.images, name)

            def load(self, index):
                if 4 <= index < 8:
                    raise BadImage("broken")
                return self.images.load(index)

        encode(images=Images(), crop="shorter", max_bad_fraction=0.4)
        assert [shard.count for shard in verify(tmp_path / "latents")["shards"]] == [4, 0, 3, 4, 2]
        dataset = LatentDataset(tmp_path / "latents", mirrored=False)
        assert [dataset.name(i) for i in (3, 4)] == ["03.png", "09.png"]
        assert dataset[4].moments.shape == (8, 8, 12)
