import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
)

from litevae.diffusion import LatentDiffusionPipeline
from litevae.diffusion.config import UNetConfig
from litevae.diffusion.pipeline import generate, save_pipeline
from litevae.diffusion.unet import build_unet
from litevae.latents import sample_latents


def tiny_unet(channels=4):
    torch.manual_seed(0)
    unet = build_unet(UNetConfig([16, 16], head_channels=8, num_groups=4), channels, 8)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


@pytest.fixture
def pipeline(autoencoder):
    pipeline = LatentDiffusionPipeline(autoencoder, tiny_unet(), EDMEulerScheduler(sigma_data=1.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shift", [None, 0.75])
def test_decode_undoes_what_the_latents_were_scaled_with(autoencoder, scale, shift):
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift)
    pipeline = LatentDiffusionPipeline(autoencoder, tiny_unet(), DDIMScheduler())
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = autoencoder.encode(image).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], 1)
        latents = sample_latents(moments, scale, shift, noise=torch.zeros_like(posterior.mean))
        expected = autoencoder.decode(posterior.mean).sample
        # A few roundings of the latent, which is about 1; a pixel is a sum of hundreds of products.
        torch.testing.assert_close(pipeline.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_images_are_decoded_latents(pipeline):
    def draw(output_type):
        return pipeline(2, torch.Generator().manual_seed(1), 3, output_type=output_type).images

    latents, pixels = draw("latent"), draw("pt")
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(pixels, (pipeline.decode(latents) / 2 + 0.5).clamp(0, 1))
    (image, _), arrays = draw("pil"), draw("np")
    assert np.array_equal(np.asarray(image), (arrays[0] * 255).round().astype(np.uint8))


@pytest.mark.parametrize("kind", ["litevae", "sd-vae"])
def test_saved_pipeline_draws_the_same(autoencoder, tmp_path, kind):
    if kind == "sd-vae":
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.2,
        )
    pipeline = LatentDiffusionPipeline(autoencoder, tiny_unet(), EDMEulerScheduler(sigma_max=10.0))
    save_pipeline(pipeline, tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "diffusers")

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(1, torch.Generator().manual_seed(0), 3, output_type="pt").images

    for name in ("ours", "diffusers"):
        loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / name)
        assert loaded.scheduler.config.sigma_max == 10
        assert torch.equal(draw(loaded), draw(pipeline))


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(sigma_data=1.0), DDPMScheduler(clip_sample=False)])
def test_an_image_depends_on_its_seed_alone(pipeline, scheduler):
    pipeline.scheduler = scheduler
    together = torch.cat(list(generate(pipeline, range(5), 10, 3, batch_size=5))).int()
    apart = torch.cat(list(generate(pipeline, [1, 2], 11, 3, batch_size=1))).int()
    # The batch size changes roundings, which can change the rounding of a pixel.
    assert (together[2:4] - apart).abs().max() <= 1
    again = torch.cat(list(generate(pipeline, range(5), 10, 3, batch_size=5))).int()
    assert torch.equal(together, again)
    assert not torch.equal(together[0], together[1])


def test_another_scheduler_can_be_put_in(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    assert pipeline(1, torch.Generator().manual_seed(0), 3, output_type="latent").images.isfinite().all()


def test_channels_may_have_their_own_mean_and_deviation(autoencoder, tmp_path):
    mean, std = [1.0, -2.0, 0.5, 0.0], [0.5, 2.0, 1.0, 4.0]
    pipeline = LatentDiffusionPipeline(autoencoder, tiny_unet(), DDIMScheduler(), mean, std)
    latents = torch.randn(2, 4, 8, 8)
    channels = [latents[:, i] * std[i] + mean[i] for i in range(4)]
    with torch.no_grad():
        expected = autoencoder.decode(torch.stack(channels, 1)).sample
    torch.testing.assert_close(pipeline.decode(latents), expected)
    save_pipeline(pipeline, tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded.decode(latents), expected)
