"""The shards of an encoded data set, and a dataset that reads them.

Each shard, `shard-00000.safetensors` and so on, holds `moments` (N, 2 n_z, h, w) in float16: per image the posterior's
mean, then its log-variance in [-30, 20]. It optionally holds `moments_mirrored` of the mirrored images. Its metadata
"images" is a JSON list of [name, label]. `index.json` lists the shards and records the model, the images and the
settings. A shard covers a fixed range of the data; images that could not be read are left out of it and listed in the
index.

float16 holds every bfloat16 between 6e-5 and 65504 exactly, and a float32 to 11 bits.
"""

import hashlib
import io
import json
import operator
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.paths import PackedStrings
from litevae.errors import UserError, shorten
from litevae.files import open_regular, replacing, sha256, sync_folder, write
from litevae.latents.index import (
    IMAGES,
    INDEX,
    Shard,
    is_text,
    marker_path,
    name_shard,
    read_complete_index,
    read_images,
)

MOMENTS, MIRRORED = "moments", "moments_mirrored"

CHANGED = "its content is not what was written (SHA-256)"


def unfinished_path(folder: Path, number: int) -> Path:
    """Returns the path of the file with the first images of shard `number`, which a stopped run had encoded."""
    return folder / f".shard-{number:05d}.unfinished"


@dataclass(frozen=True)
class Unfinished:
    """The first images of a shard, in the state in which a run was stopped.

    Attributes:
        moments: (1 or 2, N, 2 n_z, h, w) float16, the second of the mirrored images; bad images are included.
        labels: labels of all N images.
        bad: numbers in the data of the bad images, with the reasons.
    """

    moments: Tensor
    labels: list[str | None]
    bad: dict[int, str]


def write_unfinished(folder: Path, number: int, identity: dict[str, Any], unfinished: Unfinished) -> None:
    """Writes a file for `read_unfinished` and flushes it to the disk.

    The file holds the SHA-256 of the rest, followed by a dict in the format of `torch.save`.
    """
    content = io.BytesIO()
    torch.save({"identity": identity, **vars(unfinished)}, content)
    with replacing(unfinished_path(folder, number)) as path:
        write(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    sync_folder(folder)


def read_unfinished(folder: Path, number: int, identity: dict[str, Any]) -> Unfinished | None:
    """Reads the file that `write_unfinished` has written; None if it does not exist.

    Raises:
        ValueError: the file is damaged, or was written for another identity.
    """
    try:
        with open_regular(unfinished_path(folder, number)) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(CHANGED)
    unusable = "is not a file that litevae encode has written"
    try:
        saved = torch.load(io.BytesIO(content), weights_only=True)
        written_for = saved.pop("identity")
    except Exception:  # the unpickler can raise almost anything, with advice that does not apply
        raise ValueError(unusable) from None
    if written_for != identity:
        raise ValueError("was left by a run with another --batch-size, or of something else")
    try:
        unfinished = Unfinished(**saved)
        fits = isinstance(unfinished.moments, Tensor) and all(
            (
                unfinished.moments.dtype == torch.float16,
                unfinished.moments.shape[:2] == (1 + identity["encoding"]["mirror"], len(unfinished.labels)),
                isinstance(unfinished.labels, list),
                all(label is None or is_text(label) for label in unfinished.labels),
                isinstance(unfinished.bad, dict),
                all(type(key) is int and is_text(reason) for key, reason in unfinished.bad.items()),
            )
        )
    except Exception:  # of values of any types
        fits = False
    if not fits:
        raise ValueError(unusable)
    return unfinished


def write_shard(
    folder: Path,
    number: int,
    first: int,
    images: list[tuple[str, str | None]],
    tensors: dict[str, Tensor],
    bad: dict[str, str],
) -> Shard:
    """Writes a shard and then its completion marker, and flushes both to the disk.

    Args:
        folder: folder of the encoded data set.
        number: number of the shard.
        first: number in the data of the shard's first image.
        images: names and labels of the images in the shard.
        tensors: `moments`, and optionally `moments_mirrored`.
        bad: names of the images that are left out, with the reasons.
    """
    # The metadata have a single entry, because safetensors writes several in no fixed order.
    content = save(tensors, {IMAGES: json.dumps(images)})
    target = folder / name_shard(number)
    with replacing(target) as path:
        write(path, content)
    digest = hashlib.sha256(content).hexdigest()
    shard = Shard(target.name, first, len(images) + len(bad), len(images), len(content), digest, bad)
    with replacing(marker_path(folder, number)) as path:
        write(path, json.dumps(asdict(shard)).encode())
    sync_folder(folder)
    return shard


def find_damage(folder: Path, shard: Shard) -> str | None:
    """Returns the reason why a shard's file is unusable (missing, wrong length or content), or None."""
    path = folder / shard.file
    try:
        if path.stat().st_size != shard.bytes:
            return f"has {path.stat().st_size} bytes, not {shard.bytes}"
        digest = sha256(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == shard.sha256 else CHANGED


def verify(folder: Path, part: bool = False) -> dict[str, Any]:
    """Checks that an encoded data set is complete, and the SHA-256 and the tensors of each shard.

    Args:
        folder: folder that `litevae encode` has written.
        part: whether the folder may hold a range of the shards only.

    Returns:
        Content of index.json, with `Shard`s in "shards".

    Raises:
        UserError: the message names the first fault.
    """
    index = read_complete_index(folder, part)
    shape = tuple(index["latents"]["shape"])
    names = {MOMENTS, *([MIRRORED] if index["encoding"]["mirror"] else [])}
    end, count = 0, index["images"]["count"]
    if index.get("part"):
        size = index["encoding"]["shard_size"]
        shards = index["part"].shards(-(-count // size))
        end, count = shards.start * size, min(shards.stop * size, count)
    for shard in index["shards"]:
        damage, remedy = find_damage(folder, shard), "the same litevae encode command repairs it"
        if damage is None:
            remedy = f"delete it, and {remedy}"  # the command checks only the bytes
            try:
                with safe_open(folder / shard.file, framework="pt") as file:
                    tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    found = {name: (each.get_dtype(), *each.get_shape()) for name, each in tensors.items()}
                    listed = len(read_images(file))
            except (SafetensorError, OSError, ValueError) as error:
                damage = f"cannot be read: {error}"
            else:
                expected = dict.fromkeys(names, ("F16", shard.count, *shape))
                if found != expected or listed != shard.count:
                    damage = f"does not hold what {INDEX} says"
        if damage is None and (shard.first != end or shard.count + len(shard.bad) != shard.images):
            damage = f"is listed in {INDEX} with numbers that do not fit"
        if damage is not None:
            raise UserError(f"{folder / shard.file}: {damage}; {remedy}")
        end += shard.images
    if end != count:
        raise UserError(f"{folder / INDEX}: lists {end} of {count} images")
    return index


class Latent(NamedTuple):
    """An encoded image."""

    moments: Tensor  # (2 n_z, h, w) float32, for `sample_latents`
    label: int  # position in `LatentDataset.labels`; -1 without a label


class LatentBatch(NamedTuple):
    """Several encoded images."""

    moments: Tensor  # (N, 2 n_z, h, w) float32
    label: Tensor  # (N,) int64, as `Latent.label`


class LatentDataset(Dataset[Latent]):
    """The images of a folder that `litevae encode` has written.

    Mirrored copies follow the images: item i + `count` is the mirrored item i. An integer, which may be negative,
    selects a `Latent`. A slice, or a sequence or tensor of integers or of one boolean per item, selects a
    `LatentBatch`. The files are mapped into memory, so that random access reads only the items themselves, also in
    worker processes.

    Args:
        folder: folder that `litevae encode` has written.
        mirrored: whether to include the mirrored copies, if there are any.
        check: whether to check the content of all files, which reads them once. Their lengths are always checked.

    Attributes:
        count: number of images.
        labels: names of the classes, in numerical order if all are whole numbers, else in alphabetical order.
        index: content of index.json.

    Raises:
        UserError: the folder does not exist or is incomplete, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], mirrored: bool = True, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = verify(self.folder) if check else read_complete_index(self.folder)
        self.shards: list[Shard] = self.index["shards"]
        names: list[str] = []
        labels: list[str | None] = []
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: {find_damage(self.folder, shard)}")
            try:
                with safe_open(path, framework="pt") as file:
                    listed = read_images(file)
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from None
            if len(listed) != shard.count:
                raise UserError(f"{path}: does not hold what {INDEX} says")
            names += [name for name, _ in listed]
            labels += [label for _, label in listed]
        self.names = PackedStrings(names)
        known = {label for label in labels if label is not None}
        numeric = all(re.fullmatch(r"[+-]?\d{1,100}", label) for label in known)
        self.labels = sorted(known, key=(lambda label: (int(label), label)) if numeric else None)
        targets = {label: i for i, label in enumerate(self.labels)}
        self.targets = torch.tensor([-1 if label is None else targets[label] for label in labels])
        self.ends = torch.tensor([shard.count for shard in self.shards]).cumsum(0)
        self.count = len(self.names)
        self.copies = 2 if mirrored and self.index["encoding"]["mirror"] else 1
        self.files: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.count * self.copies

    @overload
    def __getitem__(self, index: int) -> Latent: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> LatentBatch: ...

    def __getitem__(self, index: Any) -> Latent | LatentBatch:
        numbers = self.resolve(index)
        if isinstance(numbers, int):
            return self.item(numbers)
        items = [self.item(number) for number in numbers]
        shape = self.index["latents"]["shape"]
        moments = torch.stack([item.moments for item in items]) if items else torch.empty(0, *shape)
        return LatentBatch(moments, torch.tensor([item.label for item in items], dtype=torch.int64))

    def resolve(self, index: Any) -> int | Sequence[int]:
        """Returns the numbers of the items that `__getitem__` selects, each from 0.

        Raises:
            IndexError: an item does not exist, or a mask has another length.
            TypeError: `index` is of another type or has more dimensions.
        """
        if isinstance(index, slice):
            return range(len(self))[index]
        try:
            array = index.numpy(force=True) if isinstance(index, Tensor) else np.asarray(index)
        except Exception:  # a ragged list, or a tensor that NumPy has no equivalent of
            array = np.empty((0, 0))
        kind = array.dtype.kind
        if array.shape == (0,) and isinstance(index, list | tuple):  # float64 in NumPy
            return []
        if array.ndim == 0 and kind != "b":
            with suppress(TypeError):  # `index` is not a whole number
                return self.position(operator.index(index))
        if array.ndim == 1 and kind == "b":
            if len(array) != len(self):
                raise IndexError(f"a mask must have {len(self)} booleans, one per item, got {len(array)}")
            return [int(number) for number in np.flatnonzero(array)]
        if array.ndim == 1 and kind in "iu":
            return [self.position(number) for number in array.tolist()]
        raise TypeError(
            "an index must be a whole number, a slice, or a flat sequence or tensor of whole numbers or booleans, "
            f"got {shorten(index)}"
        )

    def position(self, number: int) -> int:
        """Returns the number of an item, counted from 0; `IndexError` if it does not exist."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {shorten(number)} of {len(self)}")
        return number % len(self)

    def item(self, number: int) -> Latent:
        copy, position = divmod(number, self.count)
        shard = int(torch.searchsorted(self.ends, position, right=True))
        if shard not in self.files:
            self.files[shard] = load_file(self.folder / self.shards[shard].file)
        row = position - int(self.ends[shard]) + self.shards[shard].count
        moments = self.files[shard][MIRRORED if copy else MOMENTS][row]
        return Latent(moments.float(), int(self.targets[position]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # each process maps the files itself

    def name(self, index: int) -> str:
        """Returns the image's name within the data that it was encoded from."""
        number = self.resolve(index)
        if not isinstance(number, int):
            raise TypeError(f"the index of a name must be a whole number, got {shorten(index)}")
        return self.names[number % self.count]

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Calls `sample_latents` with the scaling and shift factors of the model that encoded the images."""
        latents = self.index["latents"]
        return sample_latents(moments, latents["scaling_factor"], latents["shift_factor"], generator)


def sample_latents(
    moments: Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draws a sample from each posterior and normalises it: (sample - shift_factor) * scaling_factor.

    Args:
        moments: posterior moments, (N, 2 n_z, h, w) float32.
        scaling_factor: factor of the model's configuration.
        shift_factor: shift of the model's configuration; None is 0.
        generator: generator of the noise, on the moments' device.
        noise: standard normal noise of the result's shape; None draws it with `generator`.

    Returns:
        Latents for a diffusion model, (N, n_z, h, w) float32.
    """
    posterior = DiagonalGaussianDistribution(moments)
    sample = posterior.sample(generator) if noise is None else posterior.mean + posterior.std * noise
    return (sample - (shift_factor or 0.0)) * scaling_factor
