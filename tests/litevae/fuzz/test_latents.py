"""Generated indexes, shard notes and unfinished shards of encoded data sets."""

import hashlib
import io
import json
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import LatentDataset, Settings, encode_images
from litevae.latents.index import marker_path, read_marker
from litevae.latents.shards import read_unfinished, unfinished_path

EACH = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "long"])


CROPS = pytest.mark.parametrize("crop", ["middle", "shorter"])


@pytest.fixture
def crop():
    return "middle"


@pytest.fixture
def encoded(model_folder, photographs, tmp_path, one_thread, crop):
    model, images = LiteVAE.from_pretrained(model_folder), open_images(str(photographs))
    encode_images(model, images, tmp_path / "latents", Settings(32, shard_size=8, crop=crop), 4, 0, 0.1)
    return tmp_path / "latents"


@EACH
@CROPS
def test_any_index(explore, ends_well, command, broken_json, encoded, long):
    index = encoded / "index.json"

    def check(content):
        index.write_bytes(content)
        message = command("encode", "--verify", encoded)
        if message is None:
            ends_well(lambda: [LatentDataset(encoded)[i] for i in range(10)])
        ends_well(LatentDataset, encoded, True, False)

    document = json.loads(index.read_text())
    document["shards"][0]["bad"] = {"a.png": "broken"}
    explore(broken_json(document), check, 120, long)


@EACH
@CROPS
def test_any_names_and_labels_in_a_shard(explore, ends_well, command, broken_json, encoded, long):
    path = encoded / "shard-00000.safetensors"
    before = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        listed = json.loads(file.metadata()["images"])
    tensors = load_file(path)
    index = json.loads((encoded / "index.json").read_text())

    def check(content):
        changed = save(tensors, {"images": content.decode(errors="replace")})
        path.write_bytes(changed)
        index["shards"][0] |= {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        (encoded / "index.json").write_text(json.dumps(index))
        command("encode", "--verify", encoded)
        ends_well(lambda: [LatentDataset(encoded)[i] for i in range(10)])

    sizes = listed[0][2:]
    explore(broken_json([*listed, ["a.png", "7", *sizes], ["b.png", None, *sizes]]), check, 60, long)
    assert path.read_bytes() != before


@EACH
def test_any_note_of_a_shard(explore, ends_well, broken_json, encoded, long):
    note = json.loads((encoded / "index.json").read_text())["shards"][0] | {"bad": {"a.png": "broken"}}

    def check(content):
        marker_path(encoded, 0).write_bytes(content)
        ends_well(read_marker, encoded, 0)

    explore(broken_json(note), check, 100, long)


@EACH
def test_any_unfinished_shard(explore, ends_well, broken_json, tmp_path, long):
    identity = {"encoding": {"mirror": False}, "shard": 0}
    valid = {
        "identity": identity,
        "moments": [0],
        "numbers": [[0, 2]],
        "labels": [["0", "a"], ["2", None]],
        "bad": {"3": "broken"},
    }
    moments = torch.zeros(1, 2, 8, 2, 2, dtype=torch.float16)

    def read():
        try:
            read_unfinished(tmp_path, 0, identity)
        except ValueError as error:
            raise UserError(str(error)) from None

    def check(content):
        with suppress(
            ValueError, TypeError, KeyError, OverflowError, RecursionError
        ):  # else garbage, and not a dict in torch's format
            saved = io.BytesIO()
            document = json.loads(content)
            document["moments"] = [moments for _ in document["moments"]]
            document["labels"] = {int(number): label for number, label in document["labels"]}
            torch.save(document, saved)
            content = saved.getvalue()
        unfinished_path(tmp_path, 0).write_bytes(hashlib.sha256(content).digest() + content)
        message = ends_well(read)
        assert message is None or message.startswith(("is not a file that", "was left by"))

    explore(broken_json(valid), check, 100, long)


def test_an_encoding_continues_whatever_is_in_its_folder(encoded, model_folder, photographs, ends_well):
    before = {path.name: path.read_bytes() for path in encoded.glob("*.safetensors")}
    model, images = LiteVAE.from_pretrained(model_folder), open_images(str(photographs))
    for content in (b"", b"garbage", b"[" * 9000, b'{"file": "/dev/zero", "bytes": 0}'):
        marker_path(encoded, 1).write_bytes(content)
        unfinished_path(encoded, 1).write_bytes(hashlib.sha256(content).digest() + content)
        (encoded / "shard-00001.safetensors").unlink()
        ends_well(encode_images, model, images, encoded, Settings(32, shard_size=8), 4, 0, 0.1)
        assert {path.name: path.read_bytes() for path in encoded.glob("*.safetensors")} == before
