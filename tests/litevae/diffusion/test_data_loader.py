import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.diffusion.data_loader import LatentData
from litevae.errors import UserError
from litevae.latents import LatentDataset, Settings, encode_images


@pytest.fixture
def feed(autoencoder, tmp_path):
    def make(config):
        return LatentData(config, autoencoder, Accelerator(cpu=True), tmp_path, resuming=False)

    return make


def test_shards_and_images_give_the_same_latents(tiny, feed, photographs, latents):
    """Each epoch has every latent once, and mirrored latents only on request."""
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))

    def epoch(count, *settings):
        made = feed(tiny("data.batch_size=2", "data.workers=0", *settings))
        batches = made.batches(done=0)
        moments = torch.cat([made.moments(next(batches)) for _ in range(count // 2)])
        assert moments.shape == (count, 8, 8, 8)
        assert moments.dtype == torch.float32
        found = made.sample(moments, noise.expand(count, -1, -1, -1))
        return found[found[:, 0, 0, 0].argsort()], made

    encoded, _ = epoch(6, "data.flip=false")
    live, made = epoch(6, "data.latents=", f"data.train={photographs}", "data.crop=native", "data.flip=false")
    assert made.shape == (4, 8, 8)
    # The shards hold mean and log-variance in float16: errors of 2^-11 of the mean and 2^-12 of the deviation.
    torch.testing.assert_close(live, encoded, rtol=2**-10, atol=2**-10)
    # The definition, written out.
    dataset = LatentDataset(latents)
    mean, logvar = torch.stack([dataset[i].moments for i in range(6)]).chunk(2, dim=1)
    scale = dataset.index["latents"]["scaling_factor"]
    expected = (mean + (logvar / 2).exp() * noise - 0.1) * scale
    torch.testing.assert_close(encoded, expected[expected[:, 0, 0, 0].argsort()])
    assert len(epoch(12)[0].unique(dim=0)) == 12


def test_a_resumed_run_goes_on_with_the_next_batch(tiny, feed):
    whole = list(feed(tiny("max_steps=5")).batches(done=0))
    rest = list(feed(tiny("max_steps=5")).batches(done=3))
    assert len(whole) == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, whole[3:], strict=True))


def test_latents_of_another_model_or_scale_are_refused(tiny, feed, autoencoder):
    autoencoder.register_to_config(scaling_factor=3.0)
    with pytest.raises(
        UserError, match=r"scaling_factor was 0\.\d+|scaling_factor was \d+.*and it is 3.0 now"
    ):
        feed(tiny())
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).add_(1)
    with pytest.raises(UserError, match="was encoded with another model than model="):
        feed(tiny())


def test_latents_of_whole_images_are_refused(tiny, feed, autoencoder, photographs, tmp_path):
    settings = Settings(32, crop="area")
    encode_images(autoencoder, open_images(str(photographs)), tmp_path / "whole", settings, workers=0)
    with pytest.raises(
        UserError, match=r"whole: holds latents of whole images, .*: encode the images with --crop middle"
    ):
        feed(tiny(f"data.latents={tmp_path / 'whole'}"))


def test_latents_that_are_not_scaled_are_refused(tiny, feed, autoencoder, photographs):
    settings = ["data.latents=", f"data.train={photographs}"]
    feed(tiny(*settings)).check_spread(1.0)
    scale = autoencoder.config.scaling_factor
    autoencoder.register_to_config(scaling_factor=3 * scale)
    with pytest.raises(UserError, match=r"standard deviation is .*not about 1: litevae scale .* measures"):
        feed(tiny(*settings)).check_spread(1.0)
    feed(tiny(*settings)).check_spread(3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.latents=nowhere"], "nowhere: no such folder"),
        (["data.latents=", "data.train=nowhere"], "nowhere"),
        (["data.latents=", "data.train=demo", "data.size=30"], "data.size must be a multiple of 4"),
    ],
)
def test_mistakes_are_named(tiny, feed, settings, message):
    with pytest.raises(UserError, match=message):
        feed(tiny(*settings))


def test_images_that_cannot_be_read_are_reported(tiny, feed, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_text("no image")
    config = tiny("data.latents=", f"data.train={folder}", "data.max_bad_fraction=0.3")
    made = feed(config)
    batch = next(made.batches(done=0))
    assert made.moments(batch).isfinite().all()
    made.note_bad(batch)
    assert (tmp_path / "bad_images.txt").read_text().startswith(str(folder / "bad.png") + "\t")
    made = feed(tiny("data.latents=", f"data.train={folder}"))
    with pytest.raises(
        UserError, match=r"1 of 4 images cannot be used, more than data\.max_bad_fraction=0\.01"
    ):
        made.note_bad(next(made.batches(done=0)))


def test_a_model_of_one_size_refuses_another(tiny, photographs, tmp_path):
    vit = LiteVAE.from_preset(
        "litevae-s",
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        num_groups=4,
        sample_size=16,
        aggregator="vit",
    )
    config = tiny("data.latents=", f"data.train={photographs}", "data.size=32")
    with pytest.raises(UserError, match="16"):
        LatentData(config, vit, Accelerator(cpu=True), tmp_path, resuming=False)
