"""The data of a diffusion model: posteriors from encoded shards, or of images that are encoded in each step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litevae.data.bad_images import BAD_IMAGES, BadImages
from litevae.data.batches import Batches
from litevae.data.crops import CropBatch, CropSettings, Order, TrainingCrops, collate
from litevae.data.sources import ImageSource, open_images
from litevae.diffusion.config import DiffusionConfig
from litevae.errors import UserError
from litevae.latents import LatentDataset, sample_latents
from litevae.latents.statistics import LatentStatistics, read_statistics
from litevae.models.interface import Autoencoder, check_size, encode_pixels, pixel_format, spatial_compression
from litevae.models.loading import model_folder
from litevae.models.weights import hash_encoder
from litevae.signals import obey_parent_only
from litevae.training.config import Stage
from litevae.training.data_loader import ShareSampler

MEASURED = 64  # number of latents whose standard deviation is checked


class ShuffledLatents(Dataset[Tensor]):
    """The moments of a folder's latents, shuffled anew for each epoch."""

    def __init__(self, latents: LatentDataset, seed: int) -> None:
        self.latents = latents
        self.ordered = Order(len(latents), seed)

    def __getitem__(self, index: int) -> Tensor:
        return self.latents[self.ordered(index)].moments


class LatentData:
    """Batches of posterior moments, the same from both sources except for the rounding to float16.

    `shape` is the shape (n_z, h, w) of a latent; `images` is the source at `config.data.train`, or None;
    `bad_images` lists the images of it that cannot be used.

    Args:
        config: settings of the run.
        autoencoder: model that encodes the images of `config.data.train` on its device, in float32 or under
            autocast.
        accelerator: Accelerator, which knows the rank of this process.
        folder: output folder, for bad_images.txt.
        resuming: whether to continue that list.

    Raises:
        UserError: there is no such data, the folder holds no latents, they were encoded with another model or with
            another scale, or the model does not take the size.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        autoencoder: Autoencoder,
        accelerator: Accelerator,
        folder: Path,
        resuming: bool,
    ) -> None:
        self.config, self.autoencoder, self.accelerator = config, autoencoder, accelerator
        self.scaling_factor: float = autoencoder.config.scaling_factor
        self.shift_factor: float | None = autoencoder.config.get("shift_factor")
        self.channels: LatentStatistics | None = None  # what each channel is normalised by, instead of these
        if config.normalise == "channel":
            channels: int = autoencoder.config.latent_channels
            self.channels = read_statistics(model_folder(Path(config.model)), self.scaling_factor, channels)
        self.bad_images: BadImages | None = None
        self.images: ImageSource | None = None
        self.dataset: Dataset[Any]
        self.collate: Callable[[list[Any]], CropBatch | Tensor]
        if config.data.latents:
            self.open_latents(Path(config.data.latents))
        else:
            self.open_images(folder / BAD_IMAGES, resuming)

    def open_latents(self, folder: Path) -> None:
        # One process reads the whole folder to check it.
        latents = LatentDataset(folder, self.config.data.flip, check=self.accelerator.is_main_process)
        if not len(latents):
            raise UserError(f"{folder}: holds no latents")
        if latents.shape is None:
            raise UserError(
                f"{folder}: holds latents of whole images, and a diffusion model here learns one shape: encode the "
                "images with --crop middle, the default"
            )
        if latents.index["model"]["sha256"] != hash_encoder(self.autoencoder):
            raise UserError(f"{folder}: was encoded with another model than model={self.config.model}")
        recorded = latents.index["latents"]
        for name, current in (("scaling_factor", self.scaling_factor), ("shift_factor", self.shift_factor)):
            if (recorded[name] or 0.0) != (current or 0.0):  # without a shift, it is None or 0
                raise UserError(
                    f"{folder}: was encoded when the model's {name} was {recorded[name]}, and it is {current} now: "
                    "run the same litevae encode command again to record it"
                )
        channels, height, width = latents.shape
        self.shape = (channels // 2, height, width)
        self.pixels = height * spatial_compression(self.autoencoder)
        self.dataset, self.collate = ShuffledLatents(latents, self.config.seed), torch.stack

    def open_images(self, bad_list: Path, resuming: bool) -> None:
        config, factor = self.config.data, spatial_compression(self.autoencoder)
        size = config.size or self.autoencoder.config.sample_size
        check_size(self.autoencoder, size, "data.size")
        self.shape = (self.autoencoder.config.latent_channels, size // factor, size // factor)
        self.pixels = size
        self.images = open_images(config.train, pixel_format(self.autoencoder))
        crops = CropSettings(size, config.crop, config.flip, config.max_bad_fraction)
        length = self.config.max_steps * config.batch_size
        self.dataset = TrainingCrops(self.images, crops, self.config.seed, length)
        self.collate = collate
        if self.accelerator.is_main_process and not resuming:
            bad_list.unlink(missing_ok=True)  # left by an earlier run
        self.accelerator.wait_for_everyone()
        self.bad_images = BadImages(bad_list, len(self.images), config.max_bad_fraction)

    def batches(self, done: int) -> Iterator[CropBatch | Tensor]:
        """Yields this process's share of each batch after step `done`, for `note_bad` and `moments`."""
        config = self.config
        steps = Stage(
            1, config.max_steps, size=self.pixels, batch_size=config.data.batch_size, first_sample=0
        )
        processes = self.accelerator.num_processes
        loader: DataLoader[CropBatch | Tensor] = DataLoader(
            self.dataset,
            batch_sampler=ShareSampler(steps, done, self.accelerator.process_index, processes),
            collate_fn=self.collate,
            num_workers=config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # a resumed run would draw once more from the global one
            worker_init_fn=obey_parent_only,
        )
        return Batches(loader)

    def empty_batch(self) -> Tensor:
        """Returns moments that stand for a share of a batch that cannot be read, and must not be trained on."""
        share = self.config.data.batch_size // self.accelerator.num_processes
        channels, *side = self.shape
        return torch.zeros(share, 2 * channels, *side)

    def note_bad(self, batch: CropBatch | Tensor) -> None:
        """Lists the images that could not be used; raises UserError if there are too many."""
        if isinstance(batch, CropBatch) and self.bad_images is not None:
            self.bad_images.add(batch.bad)

    @torch.no_grad()
    def moments(self, batch: CropBatch | Tensor) -> Tensor:
        """Returns the moments of a batch's latents, (N, 2 n_z, h, w) float32, on the run's device."""
        device = self.accelerator.device
        if not isinstance(batch, CropBatch):
            return batch.to(device, non_blocking=True)
        with self.accelerator.autocast():
            posterior = encode_pixels(self.autoencoder, batch.images)
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Samples the latents (N, n_z, h, w) to learn, normalised by the model's scale and shift or by channel."""
        if self.channels is None:
            return sample_latents(moments, self.scaling_factor, self.shift_factor, noise=noise)
        mean, std = (
            noise.new_tensor(values).view(-1, 1, 1) for values in (self.channels.mean, self.channels.std)
        )
        return (sample_latents(moments, noise=noise) - mean) / std

    def check_spread(self, expected: float) -> None:
        """Raises UserError if the first latents' standard deviation is not within a factor of 2 of `expected`."""
        count = min(MEASURED, self.config.data.batch_size)
        moments = self.moments(self.collate([self.dataset[i] for i in range(count)]))
        generator = torch.Generator(moments.device).manual_seed(0)
        shape = (len(moments), *self.shape)
        noise = torch.randn(shape, generator=generator, device=moments.device)
        std = self.sample(moments, noise).std().item()
        if not expected / 2 <= std <= expected * 2:
            raise UserError(
                f"the latents' standard deviation is {std:.3g} with the model's scaling_factor="
                f"{self.scaling_factor:.5g}, and not about {expected:g}: litevae scale {self.config.model} IMAGES "
                "measures the factor"
                + (
                    "; then run the same litevae encode command again to record it"
                    if self.images is None
                    else ""
                )
            )
