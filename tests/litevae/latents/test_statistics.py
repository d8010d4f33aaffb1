import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents.statistics import measure_latents
from litevae.training import train
from litevae.training.checkpoint import damage, find_checkpoints

SIZE = 32


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    with torch.no_grad():  # gives the channels different scales, and means far from 0
        conv = model.encoder.feature_aggregator.conv_out
        conv.weight[1] *= 10
        conv.bias[:4] = torch.tensor([0.0, 5.0, -3.0, 1.0])
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE]).save(
            folder / f"{i}.png"
        )
    (folder / "bad.png").write_text("no image")
    return folder


def test_statistics_are_those_of_samples(model, folder):
    found = measure_latents(model, open_images(str(folder)), SIZE, batch_size=2, workers=0)
    assert found.count == 5
    pixels = np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(5)])
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double() / 127.5 - 1
    draws = 2000
    with torch.no_grad():
        posterior = model.encode(images.float()).latent_dist
        samples = posterior.mean.double() + posterior.std.double() * torch.randn(
            draws, *posterior.mean.shape, dtype=torch.float64
        )
    # five standard errors of the noise; the images are the same
    each = samples.transpose(0, 2).flatten(1)
    error = 5 * posterior.std.max().double() / each.shape[1] ** 0.5
    assert (torch.tensor(found.mean) - each.mean(1)).abs().max() < error
    assert (torch.tensor(found.std) - each.std(1)).abs().max() < error
    assert 1 / found.scaling_factor == pytest.approx(samples.std().item(), abs=error.item())


def test_count_takes_images_at_equal_distances(model, folder):
    (folder / "bad.png").unlink()
    images = open_images(str(folder))
    assert measure_latents(model, images, SIZE, count=3, workers=0).count == 3
    with pytest.raises(UserError, match="size must be a multiple of 4, at least 16, got 30"):
        measure_latents(model, images, 30)


def test_command_stores_them_in_the_config(model, folder, tmp_path, capsys):
    arguments = ["scale", tmp_path / "model", folder, "--size", SIZE, "--workers", 0]
    assert main([str(argument) for argument in arguments]) == 0
    assert "5 images of 32 x 32 pixels" in capsys.readouterr().out
    loaded = LiteVAE.from_pretrained(tmp_path / "model").config
    assert len(loaded.latents_mean) == len(loaded.latents_std) == 4
    assert loaded.latents_std[1] > 2 * loaded.latents_std[0]
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["scaling_factor"] == loaded.scaling_factor != 1.0
    assert stored["_class_name"] == "LiteVAE"


def test_command_changes_nothing_else_in_the_config(model, folder, tmp_path):
    path = tmp_path / "model" / "config.json"
    before = json.loads(path.read_text())
    LiteVAE.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    assert str(tmp_path) in path.read_text()  # diffusers adds the folder that it loads from
    for _ in range(2):
        assert main(["scale", str(tmp_path / "model"), str(folder), "--size", "32", "--workers", "0"]) == 0
    after = json.loads(path.read_text())
    changed = {"scaling_factor", "latents_mean", "latents_std"}
    assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} == changed
    assert str(tmp_path) not in path.read_text()


class TestScaleOfARun:
    @pytest.fixture
    def run(self, tiny, folder, tmp_path, no_pictures):
        train(tiny("max_steps=1", "checkpoint.every=1"))
        assert main(["scale", str(tmp_path / "run"), str(folder), "--size", "32", "--workers", "0"]) == 0
        return tmp_path / "run"

    def test_resuming_keeps_it_until_the_model_is_trained_further(self, run, tiny):
        scale = LiteVAE.from_pretrained(run / "model").config.scaling_factor
        assert scale != 1.0
        train(tiny("max_steps=1", "checkpoint.every=1", "resume=auto"))
        assert LiteVAE.from_pretrained(run / "model").config.scaling_factor == scale
        train(tiny("max_steps=2", "checkpoint.every=1", "resume=auto"))  # which changes the latents
        config = LiteVAE.from_pretrained(run / "model").config
        assert (config.scaling_factor, config.latents_mean, config.latents_std) == (1.0, None, None)

    def test_a_checkpoint_is_left_as_it_is(self, run, folder, capsys):
        (checkpoint,) = find_checkpoints(run / "checkpoints")
        for path in (checkpoint.path, checkpoint.path / "model"):
            assert main(["scale", str(path), str(folder), "--size", "32", "--workers", "0"]) == 2
            assert "belongs to a checkpoint" in capsys.readouterr().err.splitlines()[-1]
        assert damage(checkpoint) is None


def test_nothing_readable_is_one_line(model, folder, tmp_path, capsys):
    for path in folder.glob("[0-9].png"):
        path.unlink()
    assert main(["scale", str(tmp_path / "model"), str(folder), "--workers", "0"]) == 2
    assert "none of the images can be read" in capsys.readouterr().err.splitlines()[-1]
