import json

import pytest

from litevae.training import load_config

# a run of a few milliseconds a step
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


@pytest.fixture(scope="session")
def tiny_settings():
    return TINY


@pytest.fixture(scope="session")
def adversarial_settings():
    return ADVERSARIAL


@pytest.fixture(scope="session")
def logged():
    def read(folder):
        """The log's lines without what differs from run to run."""
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]

    return read


@pytest.fixture
def tiny(tmp_path):
    """The configuration of a tiny run in tmp_path/run."""

    def make(*overrides, name="run"):
        return load_config("demo", [*TINY, f"output_dir={tmp_path / name}", *overrides])

    return make
