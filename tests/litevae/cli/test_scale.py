import json
import re

import pytest

from litevae import LiteVAE
from litevae.cli import main

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scale(uneven_model, square_images, tmp_path):
    def run(status=0):
        command = ["scale", tmp_path / "model", square_images, "--size", SIZE, "--workers", 0]
        assert main([str(argument) for argument in command]) == status

    return run


def test_stores_them_in_the_config(scale, tmp_path, capsys):
    scale()
    out = capsys.readouterr().out
    assert "5 images of 32 x 32 pixels" in out
    first, second, *rest = (
        float(line.split()[-1]) for line in out.splitlines() if line.startswith("channel")
    )
    assert second > 2 * first
    assert len(rest) == 2
    loaded = LiteVAE.from_pretrained(tmp_path / "model").config
    assert (loaded.shift_factor, loaded.latents_mean, loaded.latents_std) == (0.0, None, None)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["scaling_factor"] == loaded.scaling_factor != 1.0
    assert stored["_class_name"] == "LiteVAE"


def test_changes_nothing_else_in_the_config(scale, tmp_path):
    path = tmp_path / "model" / "config.json"
    before = json.loads(path.read_text())
    LiteVAE.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    assert str(tmp_path) in path.read_text()  # diffusers adds the folder that it loads from
    for _ in range(2):
        scale()
    after = json.loads(path.read_text())
    changed = {"scaling_factor", "shift_factor"}
    assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} == changed
    assert str(tmp_path) not in path.read_text()


def test_nothing_readable_is_one_line(scale, square_images, capsys):
    for path in square_images.glob("[0-9].png"):
        path.unlink()
    scale(status=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"none of the \d+ images can be read; \S+: not an image", said)


def test_stores_the_statistics_of_each_channel_beside_it(scale, tmp_path, capsys):
    scale()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("channel")]
    stored = json.loads((tmp_path / "model" / "latent_statistics.json").read_text())
    for channel, (mean, std) in enumerate(zip(stored["mean"], stored["std"], strict=True)):
        assert printed[channel] == f"channel {channel}: mean {mean:.4f}, standard deviation {std:.4f}"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (stored["count"], stored["scaling_factor"]) == (5, config["scaling_factor"])
