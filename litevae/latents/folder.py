"""The folder of an encoded data set: its settings, index, lock and shard ranges."""

import hashlib
import os
import sys
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from litevae.data.bad_images import BAD_IMAGES, BadImages
from litevae.data.buckets import Buckets, Crop
from litevae.data.sources import ImageSource
from litevae.environment import versions
from litevae.errors import UserError, shorten
from litevae.files import TEMPORARY, make_folder
from litevae.latents.encoder import Precision
from litevae.latents.index import (
    BUCKETS_FORMAT,
    FORMAT,
    Part,
    Shard,
    marker_path,
    read_index,
    read_marker,
    write_index,
)
from litevae.latents.shards import Unfinished, find_damage, read_unfinished, unfinished_path
from litevae.lock import LOCK, locked
from litevae.models.arguments import is_whole
from litevae.models.interface import (
    Autoencoder,
    check_size,
    fixed_size,
    minimum_size,
    pixel_format,
    spatial_compression,
)
from litevae.models.weights import hash_encoder

COMMAND = "litevae encode"  # the name that a second run is given


@dataclass(frozen=True)
class Settings:
    """The settings of an encoded data set, which are fixed for a folder.

    Args:
        size: side in pixels to which the middle square of each image is resized; or see `crop`.
        precision: precision of the model, "bf16" or "fp32".
        mirror: whether each image is also encoded mirrored from left to right.
        shard_size: images per shard.
        crop: "middle" encodes the middle square of each image. "shorter" and "area" encode the whole image, resized so
            that its shorter side is `size`, or its area `size` squared. Both sides are then rounded down to multiples
            of `bucket_step`, and what is left over is cut off. An image longer than 4:1 counts as a bad one.
        bucket_step: number of pixels, a multiple of the model's factor f; None is f.
    """

    size: int = 256
    precision: Precision = "fp32"
    mirror: bool = False
    shard_size: int = 1024
    crop: Crop = "middle"
    bucket_step: int | None = None


def make_buckets(model: Autoencoder, settings: Settings) -> Buckets:
    """Returns the sizes to which images are resized for a model.

    Raises:
        UserError: the settings do not fit together, or the model does not take these sizes.
    """
    size, crop, factor = settings.size, settings.crop, spatial_compression(model)
    if crop not in get_args(Crop):
        raise UserError(f"crop must be one of {', '.join(get_args(Crop))}, got {shorten(crop)}")
    step = factor if settings.bucket_step is None else settings.bucket_step
    if crop == "middle":
        if settings.bucket_step is not None:
            raise UserError(
                f"bucket_step={step} has no effect on middle squares: choose crop shorter or area"
            )
        check_size(model, size)
        return Buckets(crop, size, step)
    pixel_format(model)  # whether it takes images
    if fixed_size(model) is not None:
        raise UserError(
            f"crop must be middle, got {crop}: this model takes only squares of {fixed_size(model)}"
        )
    if not is_whole(step, factor, 2**31) or step % factor:
        raise UserError(
            f"bucket_step must be a whole number, {factor} or a multiple of it, got {shorten(step)}"
        )
    step = int(step)
    least = -(-minimum_size(model) // step) * step
    if crop == "area":  # the shorter side of an image of 4:1 is half as long
        least *= 2
    if size % step or size < least:
        why = ", because an image of 4:1 is half as high as the square of its area" * (crop == "area")
        raise UserError(f"size must be a multiple of {step}, at least {least}, got {size}{why}")
    return Buckets(crop, size, step)


def make_header(
    model: Autoencoder, images: ImageSource, settings: Settings, part: Part | None = None
) -> dict[str, Any]:
    """Returns the content of index.json without the shards, for a range of them or, if `part` is None, for all.

    Raises:
        UserError: the model does not take images of this size.
    """
    buckets = make_buckets(model, settings)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    middle = buckets.crop == "middle"
    side = settings.size // spatial_compression(model) if middle else None
    encoding = {name: value for name, value in asdict(settings).items() if name != "bucket_step"}
    return {
        "format": FORMAT if middle else BUCKETS_FORMAT,
        "complete": False,
        "model": {
            "class": type(model).__name__,
            "sha256": hash_encoder(model),
            "config": config,
        },
        "images": {"count": len(images), "sha256": hash_keys(images)},
        "encoding": {**encoding, "crop": buckets.description},
        "latents": {
            "dtype": "float16",
            "shape": [2 * config["latent_channels"], side, side],
            **{
                name: config.get(name)
                for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
            },
        },
        "versions": versions(),
        **({} if part is None else {"part": part}),
    }


class LatentFolder:
    """The folder that a run encodes to: its index, shards and list of unreadable images.

    Args:
        path: folder of the encoded data set.
        images: source of the images.
        settings: settings of the encoded data set.
        batch_size: images per batch.
        max_bad_fraction: fraction of the images that may be unreadable.
        part: range of the shards to encode; None for all.

    Attributes:
        header: content of index.json without the shards, from `make_header`; to be set before `begin`.
        numbers: numbers of the shards to encode.
        shards: complete shards by number.
    """

    def __init__(
        self,
        path: Path,
        images: ImageSource,
        settings: Settings,
        batch_size: int,
        max_bad_fraction: float,
        part: Part | None = None,
    ) -> None:
        self.path, self.images, self.settings = path, images, settings
        self.batch_size, self.max_bad_fraction = batch_size, max_bad_fraction
        total = -(-len(images) // settings.shard_size)
        self.part = part
        self.numbers = range(total) if part is None else part.shards(total)
        self.header: dict[str, Any] = {}
        self.shards: dict[int, Shard] = {}

    def open_bad_images(self) -> BadImages:
        """Opens the list of unreadable images, which all processes continue."""
        path = self.path / BAD_IMAGES
        return BadImages(path, self.count_images(), self.max_bad_fraction, setting="--max-bad-fraction")

    def rewrite_bad_images(self) -> BadImages:
        """Writes the list anew from the complete shards, in their order; `UserError` if it is too long."""
        (self.path / BAD_IMAGES).unlink(missing_ok=True)
        bad = self.open_bad_images()
        bad.add(entry for _, shard in sorted(self.shards.items()) for entry in shard.bad.items())
        return bad

    def begin(self, until_end: ExitStack) -> dict[int, Shard]:
        """Creates and locks the folder, or locks an existing one and finds its complete shards.

        Args:
            until_end: stack that receives the lock, and holds it until it is closed.

        Returns:
            Complete shards by number.

        Raises:
            UserError: the folder holds other files, cannot be written, is in use by another run, or was begun with
                another model, other images or other settings.
        """
        try:
            make_folder(self.path)
            if read_index(self.path) is None and any(
                # A run that has not written its index yet leaves only these.
                path.name != LOCK and not path.match(TEMPORARY)
                for path in self.path.iterdir()
            ):
                raise UserError(f"{self.path}: has files, and no encoded images: give another folder")
            until_end.enter_context(locked(self.path, COMMAND))
            for path in self.path.glob(TEMPORARY):  # left by a run that was killed
                path.unlink(missing_ok=True)
            index = read_index(self.path)
            if index is None:
                write_index(self.path, self.header, [])
                return {}
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.check_unchanged(index)
        listed = dict(zip(self.numbers, index["shards"], strict=False))
        for number in self.numbers:
            shard = read_marker(self.path, number) or listed.get(number)
            if shard is None:
                continue
            damage = find_damage(self.path, shard)
            if damage is None:
                self.shards[number] = shard
            else:
                warn(f"{self.path / shard.file}: {damage}; it is encoded again")
        self.rewrite_bad_images()
        return self.shards

    def check_unchanged(self, index: dict[str, Any]) -> None:
        """Raises `UserError` unless the folder was begun with the same model, images and settings."""
        changes = [
            f"{name.replace('_', ' ')} {index['encoding'].get(name)}, not {value}"
            for name, value in self.header["encoding"].items()
            if index["encoding"].get(name) != value
        ]
        count = index["images"]["count"]
        if count != len(self.images):
            changes.append(f"{count} images, not {len(self.images)}")
        elif index["images"] != self.header["images"]:
            changes.append("images of other names")
        if index["model"]["sha256"] != self.header["model"]["sha256"]:
            changes.append("another model")
        if index.get("part") != self.part:
            first, now = (
                f"range {part}" if part else "all images" for part in (index.get("part"), self.part)
            )
            changes.append(f"{first}, not {now}")
        if changes:
            raise UserError(
                f"{self.path}: was begun with {', '.join(changes)}: give the same, or another folder"
            )

    def count_images(self) -> int:
        """Returns the number of images that the shards to encode cover."""
        return sum(len(self.shard_range(number)) for number in self.numbers)

    def shard_range(self, number: int) -> range:
        """Returns the numbers in the data of a shard's images."""
        first = number * self.settings.shard_size
        return range(first, min(first + self.settings.shard_size, len(self.images)))

    def batches(self, number: int, done: Container[int]) -> list[list[int]]:
        """Returns the numbers of a shard's images, without those in `done`, in parts to read at a time."""
        numbers = [image for image in self.shard_range(number) if image not in done]
        return [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]

    def identity(self, number: int) -> dict[str, Any]:
        """Returns all that must not change between two runs for the second to continue an unfinished shard."""
        names = ("format", "model", "images", "encoding")
        return {**{name: self.header[name] for name in names}, "batch_size": self.batch_size, "shard": number}

    def read_unfinished(self, number: int) -> Unfinished | None:
        """Reads the images of a shard that a stopped run has encoded.

        Returns:
            The images, or None if there are none. A useless file is removed, and a line on stderr says so.
        """
        try:
            return read_unfinished(self.path, number, self.identity(number))
        except ValueError as reason:
            path = unfinished_path(self.path, number)
            warn(f"{path}: {reason}; its images are encoded again")
            path.unlink(missing_ok=True)
            return None

    def complete(self) -> int:
        """Lists all shards in the index and removes their completion markers.

        Returns:
            Number of unreadable images.

        Raises:
            UserError: no image can be used, or too many cannot.
        """
        bad = self.rewrite_bad_images()
        if self.shards and not any(shard.count for shard in self.shards.values()):
            raise UserError(f"none of the images can be used: {bad.path} lists them")
        write_index(self.path, {**self.header, "complete": True}, [self.shards[i] for i in self.numbers])
        for number in self.numbers:
            marker_path(self.path, number).unlink(missing_ok=True)
            unfinished_path(self.path, number).unlink(
                missing_ok=True
            )  # left where a damaged shard was redone
        return len(bad)


def warn(message: str) -> None:
    print(message, file=sys.stderr)


def hash_keys(images: ImageSource) -> str:
    """Returns the SHA-256 of the images' keys, in their order."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(os.fsencode(images.key(index)) + b"\0")
    return digest.hexdigest()
