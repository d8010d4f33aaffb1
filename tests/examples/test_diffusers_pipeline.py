"""`examples/diffusers_pipeline.py` in a short form."""

import pytest
from diffusers import DiTPipeline
from PIL import Image

from litevae import LiteVAE
from litevae.cli import main


@pytest.fixture
def run(tmp_path):
    """A run's folder with a small model that has not been trained."""
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16, 16), layers_per_block=1, num_groups=16, sample_size=64
    )
    model.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_trains_and_samples(load_example, run, images, tmp_path):
    latents, output = tmp_path / "latents", tmp_path / "dit"
    assert main(["scale", str(run), str(images), "--size", "64", "--workers", "0"]) == 0
    assert main(["encode", str(run), str(images), str(latents), "--size", "64", "--workers", "0"]) == 0
    load_example("diffusers_pipeline").main([str(run), str(latents), "--steps", "2", "--output", str(output)])

    assert Image.open(output / "samples.png").size == (4 * 64, 2 * 64)
    pipeline = DiTPipeline.from_pretrained(output)
    assert isinstance(pipeline.vae, LiteVAE)
    assert pipeline.transformer.config.num_embeds_ada_norm == 2  # the folders' labels


def test_refuses_latents_of_several_shapes(load_example, run, images, tmp_path):
    latents = tmp_path / "latents"
    options = ["--size", "64", "--workers", "0", "--crop", "shorter"]
    assert main(["encode", str(run), str(images), str(latents), *options]) == 0
    with pytest.raises(SystemExit, match="needs latents of one shape: run litevae encode with --crop middle"):
        load_example("diffusers_pipeline").main([str(run), str(latents), "--steps", "2"])


def test_refuses_latents_of_another_scale(load_example, run, images, tmp_path):
    latents = tmp_path / "latents"
    assert main(["encode", str(run), str(images), str(latents), "--size", "64", "--workers", "0"]) == 0
    assert main(["scale", str(run), str(images), "--size", "64", "--workers", "0"]) == 0
    with pytest.raises(SystemExit, match="scaling_factor"):
        load_example("diffusers_pipeline").main([str(run), str(latents), "--steps", "2"])
