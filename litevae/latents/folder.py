"""The folder of an encoded data set: its settings, index, lock and shard ranges."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litevae.data.bad_images import BAD_IMAGES, BadImages
from litevae.data.sources import ImageSource
from litevae.environment import versions
from litevae.errors import UserError
from litevae.files import temporary_of
from litevae.latents.encoder import Precision
from litevae.latents.processes import LOCK, locked
from litevae.latents.shards import (
    FORMAT,
    INDEX,
    Shard,
    Unfinished,
    find_damage,
    note_of,
    read_head,
    read_note,
    read_unfinished,
    unfinished_of,
    write_index,
)
from litevae.models.interface import Autoencoder, check_size, spatial_compression
from litevae.models.weights import hash_encoder

CROP = "the middle square, resized by Pillow's antialiased bicubic"


@dataclass(frozen=True)
class Settings:
    """What an encoded data set depends on beside the model and the images; a folder keeps to its own.

    Args:
        size: side of the squares in pixels: the middle of each image, resized.
        precision: "bf16" or "fp32", which the model runs in.
        mirror: also encode each image mirrored from left to right.
        shard_size: images for a file.
    """

    size: int = 256
    precision: Precision = "fp32"
    mirror: bool = False
    shard_size: int = 1024


def describe(model: Autoencoder, images: ImageSource, settings: Settings) -> dict[str, Any]:
    """The content of index.json without the shards.

    Raises:
        UserError: the model does not take images of this size.
    """
    check_size(model, settings.size)
    factor = spatial_compression(model)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    side = settings.size // factor
    return {
        "format": FORMAT,
        "complete": False,
        "model": {
            "class": type(model).__name__,
            "sha256": hash_encoder(model),
            "config": config,
        },
        "images": {"count": len(images), "sha256": hash_keys(images)},
        "encoding": {**asdict(settings), "crop": CROP},
        "latents": {
            "dtype": "float16",
            "shape": [2 * config["latent_channels"], side, side],
            **{
                name: config.get(name)
                for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
            },
        },
        "versions": versions(),
    }


class LatentFolder:
    """The folder that a run encodes to: its index, shards and list of unreadable images.

    `head`: the content of index.json without the shards, as `describe` returns it; to be set before `begin`.
    `shards`: the complete shards by number.

    Args:
        path: folder of the encoded data set.
        images: source of the images.
        settings: settings of the encoded data set.
        batch_size: images per batch.
        max_bad_fraction: fraction of the images that may be unreadable.
    """

    def __init__(
        self,
        path: Path,
        images: ImageSource,
        settings: Settings,
        batch_size: int,
        max_bad_fraction: float,
    ) -> None:
        self.path, self.images, self.settings = path, images, settings
        self.batch_size, self.max_bad_fraction = batch_size, max_bad_fraction
        self.head: dict[str, Any] = {}
        self.shards: dict[int, Shard] = {}

    def list_bad(self) -> BadImages:
        """The list of the images that cannot be read, which all processes continue."""
        path = self.path / BAD_IMAGES
        return BadImages(path, len(self.images), self.max_bad_fraction, setting="--max-bad-fraction")

    def rewrite_bad(self) -> BadImages:
        """The list as of the shards that are complete, in their order; UserError if there are too many."""
        (self.path / BAD_IMAGES).unlink(missing_ok=True)
        bad = self.list_bad()
        bad.add(pair for _, shard in sorted(self.shards.items()) for pair in shard.bad.items())
        return bad

    def begin(self, until_end: ExitStack) -> dict[int, Shard]:
        """Makes the folder and locks it, or finds its complete shards.

        Args:
            until_end: gets the lock, which it holds until it is closed.

        Raises:
            UserError: the folder has other files, cannot be written, or is another data set's.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # left by a run that has not written its index yet, or was killed before
            own = {LOCK, temporary_of(self.path / INDEX).name}
            if read_head(self.path) is None and any(path.name not in own for path in self.path.iterdir()):
                raise UserError(f"{self.path}: has files, and no encoded images: give another folder")
            until_end.enter_context(locked(self.path))
            for path in self.path.glob(".*.tmp.*"):  # left by a run that was killed
                path.unlink(missing_ok=True)
            there = read_head(self.path)
            if there is None:
                write_index(self.path, self.head, [])
                return {}
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.compare(there)
        listed = dict(enumerate(there["shards"]))
        for number in range(self.count_shards()):
            shard = read_note(self.path, number) or listed.get(number)
            if shard is None:
                continue
            damage = find_damage(self.path, shard)
            if damage is None:
                self.shards[number] = shard
            else:
                warn(f"{self.path / shard.file}: {damage}; it is encoded again")
        self.rewrite_bad()
        return self.shards

    def compare(self, there: dict[str, Any]) -> None:
        """UserError unless the folder was begun with the same model, images and settings."""
        changes = [
            f"{name.replace('_', ' ')} {there['encoding'].get(name)}, not {value}"
            for name, value in self.head["encoding"].items()
            if there["encoding"].get(name) != value
        ]
        count, now = there["images"]["count"], len(self.images)
        if count != now:
            changes.append(f"{count} images, not {now}")
        elif there["images"] != self.head["images"]:
            changes.append("images of other names")
        if there["model"]["sha256"] != self.head["model"]["sha256"]:
            changes.append("another model")
        if changes:
            raise UserError(
                f"{self.path}: was begun with {', '.join(changes)}: give the same, or another folder"
            )

    def count_shards(self) -> int:
        return -(-len(self.images) // self.settings.shard_size)

    def shard_range(self, number: int) -> range:
        """The images of a shard, by their numbers in the data."""
        first = number * self.settings.shard_size
        return range(first, min(first + self.settings.shard_size, len(self.images)))

    def batches(self, number: int, start: int) -> Iterator[range]:
        """The images of a shard after `start` of them, which must be whole batches."""
        numbers = self.shard_range(number)
        return (numbers[i : i + self.batch_size] for i in range(start, len(numbers), self.batch_size))

    def identity(self, number: int) -> dict[str, Any]:
        """What a shard's first images must have been encoded as, to go on behind them."""
        names = ("format", "model", "images", "encoding")
        return {**{name: self.head[name] for name in names}, "batch_size": self.batch_size, "shard": number}

    def read_unfinished(self, number: int) -> Unfinished | None:
        """What an earlier run has encoded of a shard; None, and a line on stderr, where it is of no use."""
        try:
            return read_unfinished(self.path, number, self.identity(number))
        except ValueError as reason:
            path = unfinished_of(self.path, number)
            warn(f"{path}: {reason}; its images are encoded again")
            path.unlink(missing_ok=True)
            return None

    def complete(self) -> int:
        """Lists the shards in the index, and takes the notes of them away; the number of bad images."""
        bad = self.rewrite_bad()
        numbers = range(self.count_shards())
        if not any(shard.count for shard in self.shards.values()):
            raise UserError(f"none of the images can be read: {bad.path} lists them")
        write_index(self.path, {**self.head, "complete": True}, [self.shards[i] for i in numbers])
        for number in numbers:
            note_of(self.path, number).unlink(missing_ok=True)
            unfinished_of(self.path, number).unlink(missing_ok=True)  # of a shard that was mended, say
        return len(bad)


def warn(message: str) -> None:
    print(message, file=sys.stderr)


def hash_keys(images: ImageSource) -> str:
    """SHA-256 of the names of the images, in their order."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(os.fsencode(images.key(index)) + b"\0")
    return digest.hexdigest()
