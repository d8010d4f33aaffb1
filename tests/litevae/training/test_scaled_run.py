"""A run whose model has been changed by `litevae scale`."""

import pytest

from litevae import LiteVAE
from litevae.cli import main
from litevae.training import train
from litevae.training.checkpoint import find_checkpoints, find_damaged_file


@pytest.fixture
def run(tiny, square_images, tmp_path, no_pictures):
    train(tiny("max_steps=1", "checkpoint.every=1"))
    assert main(["scale", str(tmp_path / "run"), str(square_images), "--size", "32", "--workers", "0"]) == 0
    return tmp_path / "run"


def test_the_scale_is_kept_until_the_model_is_trained_further(run, tiny):
    scale = LiteVAE.from_pretrained(run / "model").config.scaling_factor
    assert scale != 1.0
    train(tiny("max_steps=1", "checkpoint.every=1", "resume=auto"))
    assert LiteVAE.from_pretrained(run / "model").config.scaling_factor == scale
    train(tiny("max_steps=2", "checkpoint.every=1", "resume=auto"))  # training changes the latents
    config = LiteVAE.from_pretrained(run / "model").config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (1.0, None, None)


def test_a_checkpoint_is_left_as_it_is(run, square_images, capsys):
    (checkpoint,) = find_checkpoints(run / "checkpoints")
    for path in (checkpoint.path, checkpoint.path / "model"):
        assert main(["scale", str(path), str(square_images), "--size", "32", "--workers", "0"]) == 2
        assert "belongs to a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert find_damaged_file(checkpoint) is None
