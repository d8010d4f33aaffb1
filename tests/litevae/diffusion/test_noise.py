"""The losses and samplers, against formulas in float64 and a distribution whose best denoiser is known."""

import math

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from litevae.diffusion import LatentDiffusionPipeline
from litevae.diffusion.config import NoiseConfig
from litevae.diffusion.noise import make_noise

SHAPE = (5, 2, 4, 4)


class Network(nn.Module):
    """An arbitrary function of its inputs, in their dtype."""

    def forward(self, sample, time, return_dict):
        assert not return_dict
        assert sample.shape[0] == len(time)
        return (torch.sin(3 * sample) + torch.cos(time).view(-1, 1, 1, 1),)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_loss_is_that_of_the_paper(sigma_data):
    """Equations 7 and 8 and Table 1 of Karras et al., in float64."""
    latents, noise = inputs()
    sigma = torch.tensor([0.004, 0.1, 1.0, 5.0, 160.0])
    loss = make_noise(NoiseConfig(sigma_data=sigma_data)).loss(Network(), latents, noise, sigma)

    y, s = latents.double(), sigma.double().view(-1, 1, 1, 1)
    x = y + s * noise.double()
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + s**2).sqrt()
    c_noise = s.flatten().log() / 4
    denoised = c_skip * x + c_out * Network()(c_in * x, c_noise, return_dict=False)[0]
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    expected = (weight * (denoised - y) ** 2).mean()
    # The argument of sin is about 10, the other values about 1; each is rounded to 2^-24.
    assert loss.item() == pytest.approx(expected.item(), rel=10 * 2**-24 * 10)


def test_edm_levels_are_log_normal():
    count = 100_000
    torch.manual_seed(0)
    for sigma_data in (0.5, 1.0):
        logs = make_noise(NoiseConfig(sigma_data=sigma_data)).draw(count, torch.device("cpu")).double().log()
        # -1.2 holds for data of standard deviation 0.5; the bound is 5 standard errors.
        assert logs.mean().item() == pytest.approx(-1.2 + math.log(2 * sigma_data), abs=5 * 1.2 / count**0.5)
        assert logs.std().item() == pytest.approx(1.2, abs=5 * 1.2 / (2 * count) ** 0.5)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddpm_loss_is_that_of_the_paper(schedule):
    """Equations 4 and 14 of Ho et al., in float64, with the schedule by NumPy."""
    latents, noise = inputs()
    steps = torch.tensor([0, 1, 500, 998, 999])
    ddpm = make_noise(NoiseConfig(kind="ddpm", beta_schedule=schedule))
    loss = ddpm.loss(Network(), latents, noise, steps)

    if schedule == "linear":
        betas = np.linspace(0.0015, 0.0195, 1000)
    else:
        betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    kept = torch.from_numpy(np.cumprod(1 - betas))[steps].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents.double() + (1 - kept).sqrt() * noise.double()
    predicted = Network()(noisy, steps.double(), return_dict=False)[0]
    # A product of a thousand factors, each rounded to 2^-24.
    assert loss.item() == pytest.approx((predicted - noise).square().mean().item(), rel=1000 * 2**-24)
    drawn = ddpm.draw(20_000, torch.device("cpu"))
    assert (drawn.min().item(), drawn.max().item()) == (0, 999)


class BestDenoiser(ModelMixin, ConfigMixin):
    """The optimal denoiser for normally distributed latents of this mean and standard deviation.

    E[y | x] = (std² x + sigma² mean) / (std² + sigma²).
    """

    @register_to_config
    def __init__(self, kind, mean, std, in_channels=4, sample_size=64):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))  # gives the module a dtype and a device
        betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
        self.kept = torch.from_numpy(np.cumprod(1 - betas))

    def forward(self, sample, time, return_dict):
        config, sample = self.config, sample.double()
        if config.kind == "edm":
            sigma = (4 * time.double()).exp()
            total = (1 + sigma**2).sqrt()
            x = sample * total
        else:
            kept = self.kept[time]
            sigma = ((1 - kept) / kept).sqrt()
            x = sample / kept.sqrt()
        denoised = (config.std**2 * x + sigma**2 * config.mean) / (config.std**2 + sigma**2)
        if config.kind == "edm":
            return (((denoised - x / (1 + sigma**2)) / (sigma / total)).float(),)
        return (((x - denoised) / sigma).float(),)


def by_recursion(kind, mean, std):
    """Returns mean and standard deviation of the samples of 1000 steps, computed step by step in float64.

    With the denoiser of a normal distribution each step is a linear map of x, with or without noise.
    """
    if kind == "edm":  # Equation 5 of Karras et al., for latents of twice their standard deviation
        sigma = (160 ** (1 / 7) + np.linspace(0, 1, 1000) * (0.004 ** (1 / 7) - 160 ** (1 / 7))) ** 7
        kept = np.ones(1001)
        sigma = np.append(sigma, 0)
        centre, variance = 0.0, 160**2 + 1.0
    else:
        kept = np.append(np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)[::-1], 1)
        sigma = np.sqrt(1 - kept)
        centre, variance = 0.0, 1.0
    for a, b, s, t in zip(kept, kept[1:], sigma, sigma[1:], strict=False):
        # E[y | x] = slope x + offset
        slope = std**2 * a**0.5 / (a * std**2 + s**2)
        offset = mean * (1 - slope * a**0.5)
        # Equations 12 and 16 of Song et al. with eta = 1; Euler's step is the same with a = b = 1 and without noise.
        noise = (t / s) ** 2 * (1 - a / b)
        direction = (t**2 - noise) ** 0.5 / s
        factor = b**0.5 * slope + direction * (1 - a**0.5 * slope)
        centre = factor * centre + (b**0.5 - direction * a**0.5) * offset
        variance = factor**2 * variance + noise
    return centre, variance**0.5


@pytest.mark.parametrize("kind", ["edm", "ddpm"])
@pytest.mark.parametrize(("mean", "std"), [(0.8, 0.5), (-0.3, 1.2)])
def test_sampling_with_the_best_denoiser_gives_the_distribution_back(kind, mean, std, autoencoder):
    pipeline = LatentDiffusionPipeline(
        autoencoder, BestDenoiser(kind, mean, std), make_noise(NoiseConfig(kind=kind)).scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    samples = pipeline(4, generator=generator, num_inference_steps=1000, output_type="latent").images.double()
    assert samples.shape == (4, 4, 64, 64)
    count = samples.numel()
    expected = by_recursion(kind, mean, std)
    # A thousand steps come this close to the distribution itself.
    assert expected == pytest.approx((mean, std), abs=0.01)
    # 4 standard errors of this number of samples.
    assert samples.mean().item() == pytest.approx(expected[0], abs=4 * std / count**0.5)
    assert samples.std().item() == pytest.approx(expected[1], rel=4 / (2 * count) ** 0.5)


def test_ddim_adds_no_noise():
    """Equation 12 of Song et al. with eta = 0, from step 999 to 499 and to no noise, in float64."""
    scheduler = make_noise(NoiseConfig(kind="ddpm", sampler="ddim")).scheduler()
    scheduler.set_timesteps(2)
    kept = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    found, noise = inputs()
    expected = found.double()
    for time, a, b in zip(scheduler.timesteps, kept[[999, 499]], (kept[499], 1.0), strict=True):
        found = scheduler.step(noise, time, found, return_dict=False)[0]
        latents = (expected - (1 - a) ** 0.5 * noise.double()) / a**0.5
        expected = b**0.5 * latents + (1 - b) ** 0.5 * noise.double()
    # The product of a thousand factors, each rounded to 2^-24, divides numbers of about 100.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
