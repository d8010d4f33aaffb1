"""The data of a training run: each process's share of the batches, and the images to validate on and to show."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.bad_images import BAD_IMAGES, BadImages
from litevae.data.batches import Batches
from litevae.data.config import check_has_images
from litevae.data.crops import CropBatch, CropSettings, TrainingCrops, collate
from litevae.data.pixels import Pixels
from litevae.data.sources import ImageSource, Photographs, open_images
from litevae.data.squares import load_validation, open_validation
from litevae.latents import LatentDataset
from litevae.models.interface import Autoencoder
from litevae.signals import obey_parent_only
from litevae.training.config import Config, Stage
from litevae.training.teacher_latents import EncodedImages, TaughtCrops, collate_taught, open_teacher_latents

SHOWN = 4  # number of images in reconstructions.png


class TrainingData:
    """The images of a run.

    `validation` and `shown` are lists of names and (H, W, C) images; `bad_images` lists the images that
    training could not use. The seed of PyTorch's loader is drawn from the global generator.

    Args:
        config: settings of the run.
        stages: stages of the run. Validation images have the size of the last one; those of the demo stay whole
            unless the model takes one size only.
        accelerator: Accelerator, which knows the rank of this process.
        folder: output folder, for bad_images.txt.
        resuming: whether to continue that list.
        images: training images, if they are open already.
        teacher: the teacher that `config.teacher_latents` were encoded with, if there are any.

    Raises:
        UserError: there are no images, or none of them can be read, or `open_teacher_latents` raised it.
    """

    def __init__(
        self,
        config: Config,
        stages: Sequence[Stage],
        accelerator: Accelerator,
        folder: Path,
        resuming: bool,
        images: ImageSource | None = None,
        teacher: Autoencoder | None = None,
    ) -> None:
        self.seed, self.config, self.accelerator = config.seed, config.data, accelerator
        self.takes_one_size = config.model.aggregator == "vit"
        # PyTorch's loader draws from its generator when it starts, and a resumed run starts it once more.
        self.random = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        check_has_images(self.config)
        self.images = open_images(self.config.train, self.config.pixel_format) if images is None else images
        self.open(stages[-1].size, folder / BAD_IMAGES, resuming)
        self.latents: LatentDataset | None = None
        if config.teacher_latents and teacher is not None:
            sizes = [stage.size for stage in stages]
            self.latents = open_teacher_latents(
                config.teacher_latents, teacher, self.images, self.config, sizes, accelerator.is_main_process
            )
            self.encoded = EncodedImages(self.images, self.latents)

    def open(self, size: int, bad_list: Path, resuming: bool) -> None:
        config = self.config
        source = open_validation(config)
        if self.accelerator.is_main_process and not resuming:
            bad_list.unlink(missing_ok=True)  # left by an earlier run
        self.accelerator.wait_for_everyone()
        self.bad_images = BadImages(bad_list, len(self.images), config.max_bad_fraction)
        if isinstance(source, Photographs) and not self.takes_one_size:  # the demo's stay whole
            self.validation = list(zip(source.names, source.pixels, strict=True))
        else:
            self.validation = self.load(source, size, config.validation_count) if source else []
        # The demo also shows three of its training photographs, no larger than the held-out one.
        self.shown = self.validation[:SHOWN]
        if isinstance(self.images, Photographs) and not self.takes_one_size:
            height, width = self.shown[0][1].shape[:2] if self.shown else (size, size)
            photographs = zip(self.images.names, self.images.pixels, strict=True)
            training = [(name, centre_crop(pixels, height, width)) for name, pixels in photographs]
            held_out = [(f"{name} (held out)", pixels) for name, pixels in self.shown[:1]]
            self.shown = [(f"{name} (training)", pixels) for name, pixels in training[: SHOWN - 1]] + held_out
        elif not self.shown:  # readable training images
            self.shown = load_validation(self.images, size, SHOWN, at_least=0).images

    def load(self, source: ImageSource, size: int, count: int) -> list[tuple[str, Pixels]]:
        """Loads validation images, and prints the names of unreadable ones to stderr."""
        validation = load_validation(source, size, count)
        if validation.bad and self.accelerator.is_main_process:
            names = ", ".join(name for name, _ in validation.bad)
            tqdm.write(
                f"{len(validation.bad)} of the validation images cannot be read: {names}", file=sys.stderr
            )
        return validation.images

    def batches(self, stage: Stage, done: int) -> Iterator[CropBatch]:
        """Yields this process's share of each batch of the stage after step `done`."""
        crops = TrainingCrops(
            self.images if self.latents is None else self.encoded,
            CropSettings(stage.size, self.config.crop, self.config.flip, self.config.max_bad_fraction),
            seed=self.seed,
            length=stage.first_sample + (stage.last - stage.first + 1) * stage.batch_size,
        )
        sampler = ShareSampler(stage, done, self.accelerator.process_index, self.accelerator.num_processes)
        loader: DataLoader[Any] = DataLoader(
            crops if self.latents is None else TaughtCrops(crops, self.latents),
            batch_sampler=sampler,
            collate_fn=collate if self.latents is None else collate_taught,
            num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=self.random,
            worker_init_fn=obey_parent_only,
        )
        return Batches(loader)

    def black_batch(self, stage: Stage) -> CropBatch:
        """Returns a share of a batch that stands for one that cannot be read, and must not be trained on."""
        share = stage.batch_size // self.accelerator.num_processes
        moments = None
        if self.latents is not None:
            moments = torch.zeros(share, *self.latents.index["latents"]["shape"])
        return CropBatch(self.images.pixel_format.black(share, stage.size, stage.size), [], moments)


class ShareSampler:
    """Yields the numbers of the crops that a process takes at each step after `done`."""

    def __init__(self, stage: Stage, done: int, process: int, processes: int) -> None:
        self.stage, self.done, self.process, self.processes = stage, done, process, processes

    def __iter__(self) -> Iterator[list[int]]:
        stage, share = self.stage, self.stage.batch_size // self.processes
        for step in range(max(stage.first, self.done + 1), stage.last + 1):
            start = stage.first_sample + (step - stage.first) * stage.batch_size + self.process * share
            yield list(range(start, start + share))


def centre_crop(image: Pixels, height: int, width: int) -> Pixels:
    """Crops the middle of an (H, W, C) image to at most `height` x `width` pixels."""
    top, left = max(image.shape[0] - height, 0) // 2, max(image.shape[1] - width, 0) // 2
    return image[top : top + height, left : left + width]
