import json

import pytest
import torch
from PIL import Image

from litevae import LiteVAE
from litevae.models.initialise import initialise

SETTINGS = [
    "data.batch_size=4",
    "data.workers=0",
    "unet.block_out_channels=[16,16]",
    "unet.head_channels=8",
    "unet.num_groups=4",
    "sample.count=3",
    "sample.steps=3",
    "checkpoint.every=0",
    "max_steps=3",
    "fid.measure=never",
    "tracker=none",
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def autoencoder(tmp_path, squares, litevae):
    """The folder of an untrained model with the scale of its latents."""
    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, sample_size=32
    )
    initialise(model)
    model.save_pretrained(tmp_path / "autoencoder")
    litevae("scale", tmp_path / "autoencoder", squares, "--size", 32, "--workers", 0)
    return tmp_path / "autoencoder"


def test_trains_from_images_and_repeats_the_run(litevae, autoencoder, squares, tmp_path):
    run = tmp_path / "run"
    settings = [*SETTINGS, f"model={autoencoder}", f"data.train={squares}", "data.max_bad_fraction=0.5"]
    output = litevae("train-diffusion", "small", *settings, f"output_dir={run}")
    assert "3 steps of a U-Net of" in output
    assert "FID was not measured: fid.measure is never" in output
    assert Image.open(run / "samples.png").size == (68, 68)  # 2 x 2 images of 32 pixels, with gaps
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["steps"], metrics["latent"], metrics["fid"]["fid"]) == (3, [4, 8, 8], None)
    litevae("train-diffusion", run / "config.yaml", f"output_dir={tmp_path / 'again'}")
    assert (tmp_path / "again" / "samples.png").read_bytes() == (run / "samples.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small"], "give one of data.latents"),
        (["demo"], "no configuration named 'demo'"),
        (["small", "data.latent=x"], "did you mean 'data.latents'?"),
        (["small", "model=nowhere", "data.latents=x"], "nowhere: no such folder"),
    ],
)
def test_mistake_is_one_line(fails, arguments, message):
    assert message in fails("train-diffusion", *arguments)
