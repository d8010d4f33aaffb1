import pytest
import torch
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.diffusion import load_diffusion_config
from litevae.latents import Settings, encode_images
from litevae.latents.statistics import measure_latents
from litevae.models.initialise import initialise

SIZE = 32
# A run that takes a few milliseconds per step, on latents of 4 x 8 x 8.
TINY = [
    "data.batch_size=4",
    "unet.block_out_channels=[16,16]",
    "unet.head_channels=8",
    "unet.num_groups=4",
    "sample.count=3",
    "sample.steps=3",
    "precision=fp32",
    "log_every=1",
    "checkpoint.every=0",
]


@pytest.fixture(scope="module", autouse=True)
def tiny_runs(one_thread):
    """All runs in this folder use one thread."""


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with 6 images that are not resized."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(6):
        pixels = data.chelsea()[40 * i : 40 * i + SIZE, 50 * i : 50 * i + SIZE]
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory, photographs):
    """The folder of an untrained model with the scale of its latents and a shift."""
    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, sample_size=SIZE
    )
    initialise(model)
    with torch.no_grad():  # a posterior far narrower than the spread of the means
        model.encoder.feature_aggregator.conv_out.bias[4:] -= 4
    found = measure_latents(model, open_images(str(photographs)), SIZE, workers=0)
    model.register_to_config(scaling_factor=found.scaling_factor, shift_factor=0.1)
    folder = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def autoencoder(autoencoder_folder):
    return LiteVAE.from_pretrained(autoencoder_folder)


@pytest.fixture(scope="session")
def latents(tmp_path_factory, autoencoder_folder, photographs):
    """The photographs encoded as by `litevae encode`, with mirrored copies."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    model = LiteVAE.from_pretrained(autoencoder_folder)
    settings = Settings(SIZE, "fp32", mirror=True, shard_size=4)
    encode_images(model, open_images(str(photographs)), folder, settings, workers=0)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(autoencoder_folder, latents):
    return [*TINY, f"model={autoencoder_folder}", f"data.latents={latents}"]


@pytest.fixture
def tiny(tmp_path, tiny_settings):
    """A function that returns the configuration of a tiny run in tmp_path/run."""

    def make(*overrides, name="run"):
        return load_diffusion_config("small", [*tiny_settings, f"output_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """Saves a run the time for plotting."""
    monkeypatch.setattr("litevae.diffusion.trainer.draw_loss", lambda _, path: path.touch())
