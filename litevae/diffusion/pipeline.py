"""Sampling: a diffusers pipeline that applies the autoencoder's scale and shift, which `LDMPipeline` does not."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from litevae.data.pixels import to_pixels
from litevae.files import replacing_folder
from litevae.models.interface import Autoencoder
from litevae.models.weights import write_model


class LatentDiffusionPipeline(DiffusionPipeline):
    """Draws unconditional images from a latent diffusion model; supports `save_pretrained` and `from_pretrained`.

    Args:
        vae: autoencoder. The denoiser works on (latent - shift_factor) * scaling_factor, with the factors of its
            configuration, one for all channels as in LDM. Its latents_mean and latents_std are not used.
        unet: denoiser.
        scheduler: scheduler of diffusers that matches the training of the denoiser.
        latents_mean, latents_std: with these, the denoiser works on (latent - latents_mean) / latents_std instead,
            with one value per channel. The pipeline's configuration holds them, and not the autoencoder's, which
            other pipelines read.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: Autoencoder,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(
            latents_mean=None if latents_mean is None else list(latents_mean),
            latents_std=None if latents_std is None else list(latents_std),
        )
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images.

        Args:
            batch_size: number of images.
            generator: generator of all noise, or a list with one generator per image. Generators on the CPU give
                the same noise for every device.
            num_inference_steps: number of calls of the denoiser.
            output_type: "pil"; "pt", (N, C, H, W) in [0, 1]; "np", (N, H, W, C) in [0, 1]; or "latent",
                scaled latents (N, n_z, h, w).
            return_dict: whether to return an `ImagePipelineOutput` with `images`, or a tuple.
        """
        config = self.unet.config
        device = self._execution_device
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        # float32 throughout: the schedulers round to the dtype of the network's output.
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        for time in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, time).to(self.unet.dtype)
            predicted = self.unet(scaled, time, return_dict=False)[0].float()
            latents = self.scheduler.step(predicted, time, latents, return_dict=False, **options)[0]
        images = latents if output_type == "latent" else self.decode(latents)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (N, n_z, h, w) to images (N, C, H, W), roughly in [-1, 1]."""
        config, channels = self.vae.config, self.config
        if channels.latents_mean is not None and channels.latents_std is not None:
            mean, std = (
                latents.new_tensor(values).view(-1, 1, 1)
                for values in (channels.latents_mean, channels.latents_std)
            )
            unscaled = latents * std + mean
        else:
            unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images: Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample.float()
        return images


def save_pipeline(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline through to the disk; an existing one is replaced only when the new one is complete.

    Raises:
        OSError: the pipeline cannot be written, for example because the disk is full.
    """
    with replacing_folder(folder) as new:
        new.mkdir()
        pipeline.save_config(new)
        pipeline.scheduler.save_pretrained(new / "scheduler")
        write_model(pipeline.vae, new / "vae")
        write_model(pipeline.unet, new / "unet")


def generate(
    pipeline: LatentDiffusionPipeline, numbers: Sequence[int], seed: int, steps: int, batch_size: int
) -> Iterator[Tensor]:
    """Draws images by number, in batches (n, C, H, W) uint8 on the pipeline's device.

    The noise of image i is drawn on the CPU with the seed `seed` + i, so that it depends neither on other images
    nor on the device.

    Args:
        pipeline: pipeline to draw with.
        numbers: numbers of the images.
        seed: seed of image 0.
        steps: number of calls of the denoiser.
        batch_size: images per batch.
    """
    for start in range(0, len(numbers), batch_size):
        generators = [torch.Generator().manual_seed(seed + i) for i in numbers[start : start + batch_size]]
        (latents,) = pipeline(len(generators), generators, steps, output_type="latent", return_dict=False)
        with torch.no_grad():
            yield to_pixels(pipeline.decode(latents))
