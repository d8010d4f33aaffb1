"""Noise of a diffusion model: levels to train at, the prediction of the network, and the matching sampler."""

from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from litevae.diffusion.config import NoiseConfig

EDM_SIGMA_DATA = 0.5  # standard deviation of the data in Karras et al., for their noise levels


class Noise(Protocol):
    """The noise process. `data_std` is the standard deviation of the latents that it is made for."""

    data_std: float

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Draws noise levels (count,) to train at from the global generator."""
        ...

    def loss(self, network: nn.Module, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Returns the loss, a scalar: the mean per element.

        Args:
            network: denoiser, called with the scaled noisy latents, the time and return_dict=False, as UNet2DModel.
            latents: latents (N, n_z, h, w), float32.
            noise: standard normal noise of the same shape.
            level: noise levels (N,) from `draw`.
        """
        ...

    def scheduler(self) -> SchedulerMixin:
        """Returns the diffusers sampler for a network that is trained with `loss`."""
        ...


class EDM:
    """The noise of Karras et al. (2022).

    With latents y and noise n = sigma · noise, the loss is lambda(sigma) |D(y + n) - y|² with

        D(x) = c_skip x + c_out F(c_in x, c_noise)

    for the network F; ln sigma is normally distributed. As lambda = 1 / c_out², the loss is |F - target|² with
    target = (y - c_skip x) / c_out, which is computed without subtracting nearly equal numbers.
    """

    def __init__(self, config: NoiseConfig) -> None:
        self.config = config
        self.data_std = config.sigma_data
        self.unit = config.sigma_data / EDM_SIGMA_DATA

    def draw(self, count: int, device: torch.device) -> Tensor:
        normal = torch.randn(count, device=device)
        return self.unit * torch.exp(self.config.p_mean + self.config.p_std * normal)

    def loss(self, network: nn.Module, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        sigma, sigma_data = level.view(-1, 1, 1, 1), self.data_std
        total = (sigma.square() + sigma_data**2).sqrt()
        noisy = latents + sigma * noise
        predicted = network(noisy / total, level.log() / 4, return_dict=False)[0]
        target = (sigma / sigma_data * latents - sigma_data * noise) / total
        return F.mse_loss(predicted.float(), target)

    def scheduler(self) -> EDMEulerScheduler:
        return EDMEulerScheduler(
            sigma_min=self.unit * self.config.sigma_min,
            sigma_max=self.unit * self.config.sigma_max,
            sigma_data=self.data_std,
        )


class DDPM:
    """The noise of Ho et al. (2020).

    The network predicts the noise in sqrt(a_t) y + sqrt(1 - a_t) noise, where a_t decreases with the step t. The
    loss is the mean squared error.

    The sampler is DDIM (Song et al., 2021). With eta = 1 it adds fresh noise in every step, as LDM does for FFHQ.
    With eta = 0, LDM's choice for CelebA-HQ, the errors of the noisiest steps, where little of the latent is left,
    stay in the image.
    """

    data_std = 1.0

    def __init__(self, config: NoiseConfig) -> None:
        self.config = config
        self.forward_process = self.scheduler()

    def draw(self, count: int, device: torch.device) -> Tensor:
        return torch.randint(self.config.steps, (count,), device=device)

    def loss(self, network: nn.Module, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        noisy = self.forward_process.add_noise(latents, noise, level)
        predicted = network(noisy, level, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    def scheduler(self) -> DDPMScheduler | DDIMScheduler:
        # diffusers' DDPM is DDIM with eta = 1, and its DDIM has eta = 0 unless the pipeline asks for another.
        kind = DDPMScheduler if self.config.sampler == "ddpm" else DDIMScheduler
        return kind(
            num_train_timesteps=self.config.steps,
            beta_schedule=self.config.beta_schedule,
            beta_start=self.config.beta_start,
            beta_end=self.config.beta_end,
            clip_sample=False,  # latents have no bounds
            timestep_spacing="trailing",  # from the noisiest step to no noise
        )


def make_noise(config: NoiseConfig) -> Noise:
    """Returns the noise that `config.kind` names."""
    return EDM(config) if config.kind == "edm" else DDPM(config)
