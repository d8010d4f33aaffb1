import json
import os

import pytest

from litevae.errors import UserError
from litevae.latents.index import (
    BUCKETS_FORMAT,
    FORMAT,
    Shard,
    marker_path,
    name_shard,
    parse_shard,
    read_complete_index,
    read_images,
    read_index,
    read_marker,
    write_index,
)

SHARD = Shard(name_shard(0), 0, 3, 2, 100, "0" * 64, {"bad\udcff.png": "broken"})
HEADER = {
    "format": FORMAT,
    "complete": True,
    "model": {"sha256": "0"},
    "images": {"count": 3, "sha256": "0"},
    "encoding": {"mirror": False},
    "latents": {"shape": [8, 4, 4], "scaling_factor": 0.5, "shift_factor": None},
}
COUNTS = (None, True, -1, 1.5, "1", 2**63, [])


def set_entry(document, name, value):
    """Returns a copy of a document with one entry replaced, whose name may be dotted."""
    first, _, rest = name.partition(".")
    return {**document, first: set_entry(document[first], rest, value) if rest else value}


def refusal(folder, index):
    (folder / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError) as caught:
        read_index(folder)
    return str(caught.value)


def test_an_index_is_read_as_it_was_written(tmp_path):
    assert read_index(tmp_path) is None
    write_index(tmp_path, HEADER, [SHARD])
    assert read_complete_index(tmp_path) == {**HEADER, "shards": [SHARD]}


def test_an_incomplete_index_is_refused_where_it_must_be_complete(tmp_path):
    with pytest.raises(UserError, match=r"has no index\.json"):
        read_complete_index(tmp_path)
    write_index(tmp_path, {**HEADER, "complete": False}, [])
    with pytest.raises(UserError, match="not complete"):
        read_complete_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (None, [], 1, "x")) for name in ("model", "images", "encoding", "latents")),
        *((name, (None, 0, "true", [])) for name in ("complete", "encoding.mirror")),
        ("model.sha256", (None, 1, [], "\ud800")),
        ("images.count", COUNTS),
        ("latents.shape", (None, 8, [], [8, 4], [8, 4, 0], [7, 4, 4], [8, 4, 4.0], [8, True, 4], "844", {})),
        ("latents.scaling_factor", (None, 0, True, "1", [1], float("nan"), float("inf"), 10**400)),
        ("latents.shift_factor", (True, "1", [], float("nan"))),
        ("shards", (None, {}, 1, "x")),
    ],
)
def test_an_entry_of_a_wrong_type_is_named(tmp_path, name, values):
    for value in values:
        message = refusal(
            tmp_path, {**set_entry(HEADER, name, value), **({} if name == "shards" else {"shards": []})}
        )
        assert f"not the index of encoded images: {name} must be " in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("file", ("/dev/zero", "../shard-00000.safetensors", "shard-00001.safetensors", "", None, 0, [])),
        *((name, COUNTS) for name in ("first", "images", "count", "bytes")),
        ("sha256", (None, "", "x" * 64, "0" * 63, 0)),
        ("bad", (None, [], {"x": 1}, {"x": None}, {"\ud800": "x"})),
    ],
)
def test_an_entry_of_a_shard_of_a_wrong_type_is_named(tmp_path, name, values):
    for value in values:
        entry = {**vars(SHARD), name: value}
        with pytest.raises(ValueError, match="shard 0 must "):
            parse_shard(entry, 0)
        marker_path(tmp_path, 0).write_text(json.dumps(entry))
        assert read_marker(tmp_path, 0) is None
        assert "not the index of encoded images: " in refusal(tmp_path, {**HEADER, "shards": [entry]})


@pytest.mark.parametrize("entry", [None, [], 1, "x", {}, {**vars(SHARD), "more": 1}])
def test_a_shard_of_other_entries_is_refused(entry):
    with pytest.raises(ValueError, match="shard 0 must have the entries of a shard"):
        parse_shard(entry, 0)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", "[" * 5000, '{"format": 1}', '{"format": ' + "[" * 50]
)
def test_something_else_is_no_index(tmp_path, content):
    assert len(refusal(tmp_path, content)) < 400


def test_an_index_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "index.json")
    os.mkfifo(marker_path(tmp_path, 0))
    with pytest.raises(UserError, match="not a regular file"):
        read_index(tmp_path)
    assert read_marker(tmp_path, 0) is None


class File:
    def __init__(self, images):
        self.images = images

    def metadata(self):
        return None if self.images is None else {"images": self.images}


@pytest.mark.parametrize(
    "images",
    [
        *(None, "", "{}", "1", "[1]", "[[1, null]]", '[[null, "a"]]', '[["a"]]', '[["a", "b", "c"]]'),
        *('[["a", ["b"]]]', '[["\\ud800", null]]', '[["a", "\\ud800"]]', "[" * 5000),
    ],
)
def test_names_and_labels_of_wrong_types_are_refused(images):
    with pytest.raises(ValueError):  # noqa: PT011  (the reasons differ)
        read_images(File(images), (8, 4, 4))


def test_names_and_labels_are_read():
    found = read_images(File('[["a\\udcff", null], ["b", "c"]]'), (8, 4, 5))
    assert found == [("a\udcff", None, 4, 5), ("b", "c", 4, 5)]
    found = read_images(File('[["a", null, 3, 4], ["b", "c", 7, 1]]'), (8, None, None))
    assert found == [("a", None, 3, 4), ("b", "c", 7, 1)]


@pytest.mark.parametrize(
    "entry", [*("3", "3, 4, 5", "0, 1", "3, -1", "3, 1.0", "3, true", '"3", 4', "null, null"), str(2**70)]
)
def test_shapes_of_wrong_types_are_refused(entry):
    with pytest.raises(
        ValueError, match="each of images must be a name, a label or null, and two whole numbers"
    ):
        read_images(File(f'[["a", null, {entry}]]'), (8, None, None))


@pytest.mark.parametrize(
    "shape", [[8, 4, 4], [8, None, 4], [7, None, None], [None, None, None], [8, None], [], None, 8]
)
def test_several_shapes_leave_the_sides_open(tmp_path, shape):
    header = {**HEADER, "format": BUCKETS_FORMAT}
    write_index(tmp_path, set_entry(header, "latents.shape", [8, None, None]), [])
    assert read_index(tmp_path)["latents"]["shape"] == [8, None, None]
    message = refusal(tmp_path, {**set_entry(header, "latents.shape", shape), "shards": []})
    assert "latents.shape must be an even number from 2 and twice null, got " in message
