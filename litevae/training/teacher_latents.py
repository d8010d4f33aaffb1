"""A teacher's posteriors that `litevae encode` has stored, in place of its encoder in every step."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.buckets import MIDDLE
from litevae.data.config import DataConfig
from litevae.data.crops import CropBatch, CropItem, TrainingCrops, collate
from litevae.data.pixels import PixelFormat, Pixels
from litevae.data.remote import redact_pattern
from litevae.data.sources import ImageSource
from litevae.errors import UserError
from litevae.latents import LatentDataset
from litevae.latents.folder import hash_keys
from litevae.models.interface import Autoencoder
from litevae.models.weights import hash_encoder


class EncodedImages:
    """The images of a source of which a folder holds the latents, in the order of the latents."""

    def __init__(self, images: ImageSource, latents: LatentDataset) -> None:
        numbers = [
            number
            for shard in latents.shards
            for number in range(shard.first, shard.first + shard.images)
            if images.key(number) not in shard.bad
        ]
        self.images, self.numbers = images, np.array(numbers, dtype=np.int64)

    @property
    def pixel_format(self) -> PixelFormat:
        return self.images.pixel_format

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> Pixels:
        return self.images.load(int(self.numbers[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.numbers[index]))

    def key(self, index: int) -> str:
        return self.images.key(int(self.numbers[index]))

    def label(self, index: int) -> str | None:
        return self.images.label(int(self.numbers[index]))


class TaughtItem(NamedTuple):
    item: CropItem
    moments: Tensor  # (2 n_z, h, w) float32, the teacher's mean and log-variance of the crop


class TaughtCrops(Dataset[TaughtItem]):
    """Crops of `EncodedImages`, each with the teacher's moments of the image or of its mirrored copy."""

    def __init__(self, crops: TrainingCrops, latents: LatentDataset) -> None:
        self.crops, self.latents = crops, latents

    def __getitem__(self, index: int) -> TaughtItem:
        item = self.crops[index]
        number = item.number + self.latents.count * item.mirrored
        return TaughtItem(item, self.latents[number].moments)


def collate_taught(items: Sequence[TaughtItem]) -> CropBatch:
    """Stacks the crops and their moments; a `collate_fn` for a DataLoader."""
    batch = collate([item.item for item in items])
    return batch._replace(moments=torch.stack([item.moments for item in items]))


def open_teacher_latents(
    folder: str,
    teacher: Autoencoder,
    images: ImageSource,
    config: DataConfig,
    sizes: Sequence[int],
    check: bool,
) -> LatentDataset:
    """Opens the folder with a teacher's latents of the training images.

    Args:
        folder: folder that `litevae encode` has written.
        teacher: teacher of the run.
        images: training images.
        config: settings of the training images.
        sizes: sides of the crops in all stages.
        check: whether to read all files and check their content.

    Raises:
        UserError: the folder is incomplete or damaged, or was encoded with another model, from other images, in
            another way or in another size, or lacks the mirrored copies that `config.flip` needs.
    """
    latents = LatentDataset(folder, config.flip, check)
    index = latents.index
    encoding = index["encoding"]
    fault = ""
    if index["model"]["sha256"] != hash_encoder(teacher):
        fault = "was encoded with another model than the teacher"
    elif index["images"] != {"count": len(images), "sha256": hash_keys(images)}:
        fault = f"was encoded from other images than data.train={redact_pattern(config.train)}"
    elif encoding.get("crop") != MIDDLE:
        fault = "does not hold the latents of middle squares"
    elif others := [size for size in sizes if size != encoding.get("size")]:
        fault = f"holds latents of {encoding.get('size')} x {encoding.get('size')} pixels, and a crop has {others[0]}"
    elif config.flip and not encoding["mirror"]:
        fault = "lacks the latents of mirrored images: encode with --mirror, or set data.flip=false"
    elif not len(latents):
        fault = "holds no latents"
    if fault:
        raise UserError(f"teacher_latents: {Path(folder)}: {fault}")
    return latents
