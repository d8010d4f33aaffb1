"""Sampling: a diffusers pipeline that knows an autoencoder's scale and shift, which `LDMPipeline` does not."""

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

from litevae.data.images import to_pixels
from litevae.files import replacing_folder
from litevae.models.interface import Autoencoder
from litevae.models.weights import write_model


class LatentDiffusionPipeline(DiffusionPipeline):
    """Unconditional images from a diffusion model on latents, for `save_pretrained` and `from_pretrained`.

    Args:
        vae: the autoencoder; latents are (latent - shift_factor) * scaling_factor of its configuration, one
            factor for all channels as in LDM. Its latents_mean and latents_std are not used.
        unet: the denoiser.
        scheduler: any of diffusers' that fits how the denoiser was trained.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(self, vae: Autoencoder, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
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
            batch_size: how many.
            generator: of all noise, one for all images or a list of one each; on the CPU, they give the same
                noise on every device.
            num_inference_steps: calls of the denoiser.
            output_type: "pil"; "pt", (N, 3, H, W) in [0, 1]; "np", (N, H, W, 3) in [0, 1]; or "latent",
                scaled latents (N, n_z, h, w).
            return_dict: return an `ImagePipelineOutput` with `images`, rather than a tuple.
        """
        config = self.unet.config
        device = self._execution_device
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        # in float32 all the way: the schedulers round to the dtype of what the network returns
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
        """Scaled latents (N, n_z, h, w) to images (N, 3, H, W), about in [-1, 1]."""
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images: Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample.float()
        return images


def save_pipeline(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """`save_pretrained` through to the disk, replacing a pipeline that is there only once it is complete.

    Raises:
        OSError: the disk is full, for example.
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
    """The images of these numbers, so many at a time, (n, 3, H, W) uint8 on the pipeline's device.

    The noise of image i is drawn on the CPU with the seed `seed` + i, so that it depends neither on the others nor
    on the device.
    """
    for start in range(0, len(numbers), batch_size):
        generators = [torch.Generator().manual_seed(seed + i) for i in numbers[start : start + batch_size]]
        (latents,) = pipeline(len(generators), generators, steps, output_type="latent", return_dict=False)
        with torch.no_grad():
            yield to_pixels(pipeline.decode(latents))
