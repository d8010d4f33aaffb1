import json

import pytest
from PIL import Image
from skimage import data

import litevae.training.trainer as trainer_module
from litevae.training import load_config

# A run that takes a few milliseconds per step.
TINY = [
    "data.size=32",
    "data.batch_size=2",
    "model.latent_channels=4",
    "model.block_out_channels=[16,16,16]",
    "model.layers_per_block=1",
    "model.num_groups=4",
    "log_every=1",
    "validate_every=1000000",
]
ADVERSARIAL = [
    "loss.adversarial=0.1",
    "loss.adversarial_start=3",
    "discriminator.kind=patchgan",
    "discriminator.width=S",
]
SPEED = {"images_per_second", "data_wait"}


@pytest.fixture(scope="module", autouse=True)
def tiny_runs(one_thread):
    """All runs in this folder use one thread."""


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory):
    """Settings of a tiny run, with one small image to validate on."""
    folder = tmp_path_factory.mktemp("validation")
    Image.fromarray(data.chelsea()[100:148, 100:148]).save(folder / "cat.png")
    return [*TINY, f"data.validation={folder}"]


@pytest.fixture(scope="session")
def adversarial_settings():
    return ADVERSARIAL


@pytest.fixture(scope="session")
def logged():
    def read(folder):
        """Returns the lines of the log without values that differ from run to run."""
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]

    return read


@pytest.fixture
def tiny(tmp_path, tiny_settings):
    """A function that returns the configuration of a tiny run in tmp_path/run."""

    def make(*overrides, name="run"):
        return load_config("demo", [*tiny_settings, f"output_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """Saves a run the seconds that Matplotlib takes."""
    for name in ("draw_curves", "draw_reconstructions"):
        monkeypatch.setattr(trainer_module, name, lambda *arguments: arguments[-1].touch())
