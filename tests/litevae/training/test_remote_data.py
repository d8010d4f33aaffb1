"""Training on images that a server on this computer serves."""

import io
import json

import datasets
import pytest
import webdataset
from PIL import Image
from skimage import data

from litevae.training import load_config, start, train


@pytest.fixture
def served(server):
    """Writes the same six photographs to two .tar shards, and to a .parquet file with row groups of two."""
    contents = []
    for i in range(6):
        file = io.BytesIO()
        Image.fromarray(data.chelsea()[i * 40 : i * 40 + 60, :80]).save(file, "PNG")
        contents.append(file.getvalue())
    for shard in range(2):
        with webdataset.TarWriter(str(server.folder / f"{shard}.tar")) as writer:
            for i in range(shard * 3, shard * 3 + 3):
                writer.write({"__key__": f"{i}", "png": contents[i]})
    rows = [{"bytes": content, "path": None} for content in contents]
    features = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    dataset.to_parquet(str(server.folder / "x.parquet"), batch_size=2)
    return server


@pytest.mark.parametrize("name", ["{0..1}.tar", "x.parquet"])
def test_a_resumed_run_has_the_same_bits(served, tiny_settings, tmp_path, no_pictures, assert_same_run, name):
    def run(folder, *settings):
        options = ["data.workers=0", "checkpoint.every=1", "optimizer.schedule=constant"]
        output = f"output_dir={tmp_path / folder}"
        address = f"data.train={served.url}/{name}"
        train(load_config("demo", [*tiny_settings, *options, address, output, *settings]))

    run("whole", "max_steps=4")
    served.failures.extend([503, "cut", 503])
    run("parts", "max_steps=2")
    served.failures.extend(["cut", 503, 503])
    run("parts", "max_steps=4", "resume=auto")
    assert not served.failures
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_a_run_shares_holds_no_signature(served, tiny_settings, tmp_path, no_pictures, monkeypatch):
    tracked = []
    make = start.make_accelerator
    monkeypatch.setattr(start, "make_accelerator", lambda *args: tracked.append(args[2]) or make(*args))
    address = f"{served.url}/{{0..1}}.tar"
    images = [f"data.{name}={address}?sig=secret" for name in ("train", "validation")]
    options = [
        *images,
        "data.workers=0",
        "max_steps=1",
        "checkpoint.every=0",
        f"output_dir={tmp_path / 'run'}",
    ]
    folder = train(load_config("demo", [*tiny_settings, *options])).output_dir
    assert tracked[0]["data"]["train"] == tracked[0]["data"]["validation"] == address
    metrics = (folder / "metrics.json").read_text()
    assert json.loads(metrics)["validation"]["images"] == address
    card = (folder / "model" / "README.md").read_text()
    assert "train: '{0..1}.tar'" in card
    assert "secret" not in metrics + card + str(tracked)
